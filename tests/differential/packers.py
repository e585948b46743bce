"""Writers of the quantized formats that people publish, from the formats' own formulas.

Each draws the integers and scales of one matrix [out_features, in_features] and returns what a file
holds of it, and the weights that this stands for: the oracle of a reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A matrix's tensors by what follows its name ("weight", "scales", …), and its weights in float32.
Packed = tuple[dict[str, Tensor], Tensor]
Packer = Callable[[int, int], Packed]


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Integers [..., N] in int32 words [..., N * bits / 32], the first in the lowest bits.

    With `order` a word's place i takes the i-th of these instead.
    """
    count = 32 // bits
    groups = values.long().unflatten(-1, (-1, count))
    if order is not None:
        groups = groups[..., list(order)]
    shifts = torch.arange(count) * bits
    whole = (groups << shifts).sum(-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def integers(bits: int, *shape: int, lowest: int = 0) -> Tensor:
    """Random integers of so many bits."""
    return torch.randint(lowest, 1 << bits, shape)


def scales(*shape: int) -> Tensor:
    """Random scales that float16 and bfloat16 hold."""
    return (torch.rand(*shape) * 0.02 + 0.001).bfloat16().half()


@dataclass(frozen=True, slots=True)
class Gptq:
    """AutoGPTQ: w = scale[g] · (q - zero[g]), g a row's group; words run down the inputs.

    The first version of the format stores zero - 1. `act_order` mixes the rows' groups; where
    `symmetric`, every zero is the middle.
    """

    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    version: int = 1
    symmetric: bool = False

    def __call__(self, outputs: int, inputs: int) -> Packed:
        size = inputs if self.group_size == -1 else self.group_size
        groups = inputs // size
        g_idx = torch.arange(inputs) // size
        if self.act_order:
            g_idx = g_idx[torch.randperm(inputs)]
        q, scale = integers(self.bits, inputs, outputs), scales(groups, outputs)
        zero = integers(self.bits, groups, outputs, lowest=1)
        if self.symmetric:
            zero = torch.full_like(zero, 1 << (self.bits - 1))
        stored = zero - 1 if self.version == 1 else zero
        tensors = {
            "qweight": words(q.T, self.bits).T.contiguous(),
            "qzeros": words(stored, self.bits),
            "scales": scale,
            "g_idx": g_idx.to(torch.int32),
        }
        return tensors, (scale.float()[g_idx] * (q - zero[g_idx])).T

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
        }


@dataclass(frozen=True, slots=True)
class Awq:
    """AutoAWQ's "gemm": w = scale · (q - zero); words run along the outputs, oddly ordered."""

    group_size: int = 32

    def __call__(self, outputs: int, inputs: int) -> Packed:
        groups, order = inputs // self.group_size, (0, 2, 4, 6, 1, 3, 5, 7)
        q, scale = integers(4, inputs, outputs), scales(groups, outputs)
        zero = integers(4, groups, outputs)
        tensors = {
            "qweight": words(q, 4, order),
            "qzeros": words(zero, 4, order),
            "scales": scale,
        }
        spread = torch.arange(inputs) // self.group_size
        return tensors, (scale.float()[spread] * (q - zero[spread])).T

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
        }


@dataclass(frozen=True, slots=True)
class CompressedIntegers:
    """compressed-tensors: w = scale · (q - zero), signed q, by groups or a whole channel at once.

    "pack-quantized" has words along the inputs, each integer raised by half its range, and the
    zeros in words down the outputs; "int-quantized" has plain int8. `act_order` mixes the groups.
    """

    bits: int = 4
    group_size: int | None = 32  # None is one scale a channel
    symmetric: bool = True
    packed: bool = True
    act_order: bool = False

    def __call__(self, outputs: int, inputs: int) -> Packed:
        size, half = self.group_size or inputs, 1 << (self.bits - 1)
        groups = inputs // size
        q = integers(self.bits, outputs, inputs) - half
        scale = scales(outputs, groups)
        zero = torch.zeros(outputs, groups, dtype=torch.int64)
        tensors: dict[str, Tensor] = {"weight_scale": scale}
        if self.packed:
            tensors["weight_packed"] = words(q + half, self.bits)
            tensors["weight_shape"] = torch.tensor([outputs, inputs])
        else:
            tensors["weight"] = q.to(torch.int8)
        if not self.symmetric:
            zero = integers(self.bits, outputs, groups) - half
            tensors["weight_zero_point"] = (
                words((zero + half).T, self.bits).T.contiguous()
                if self.packed
                else zero.to(torch.int8)
            )
        spread = torch.arange(inputs) // size
        if self.act_order:
            spread = spread[torch.randperm(inputs)]
            tensors["weight_g_idx"] = spread.to(torch.int32)
        return tensors, scale.float()[:, spread] * (q - zero[:, spread])

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
            "actorder": "group" if self.act_order else None,
            "dynamic": False,
        }
        return _compressed("pack-quantized" if self.packed else "int-quantized", weights)


@dataclass(frozen=True, slots=True)
class Float8:
    """Weights in float8 (e4m3) and a scale for the tensor, a channel, or a block of both.

    `compressed` are the names of compressed-tensors; else those of Qwen3 and DeepSeek, whose
    `weight_scale_inv` is multiplied too. Blocks at the edges may be cut short.
    """

    strategy: str = "block"
    compressed: bool = False
    block: tuple[int, int] = (48, 40)

    def __call__(self, outputs: int, inputs: int) -> Packed:
        weight = torch.randn(outputs, inputs).mul(10).to(torch.float8_e4m3fn)
        if self.strategy == "block":
            rows, columns = (
                torch.arange(n) // b for n, b in zip((outputs, inputs), self.block, strict=True)
            )
            scale = scales(int(rows[-1]) + 1, int(columns[-1]) + 1).float()
            spread = scale[rows][:, columns]
        else:
            scale = scales(1).float() if self.strategy == "tensor" else scales(outputs, 1).float()
            spread = scale
        name = "weight_scale" if self.compressed else "weight_scale_inv"
        return {"weight": weight, name: scale}, weight.float() * spread

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        if not self.compressed:
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": list(self.block),
            }
        block = list(self.block) if self.strategy == "block" else None
        weights = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": self.strategy,
            "block_structure": block,
            "dynamic": False,
        }
        return _compressed("float-quantized", weights)


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
    }


@dataclass(frozen=True, slots=True)
class Mlx:
    """MLX's affine form: w = scale · q + bias, words along the inputs."""

    bits: int = 4
    group_size: int = 32

    def __call__(self, outputs: int, inputs: int) -> Packed:
        groups = inputs // self.group_size
        q, scale = integers(self.bits, outputs, inputs), scales(outputs, groups)
        bias = (-8 * scales(outputs, groups)).half()
        spread = torch.arange(inputs) // self.group_size
        tensors = {
            "weight": words(q, self.bits).view(torch.uint32),
            "scales": scale,
            "biases": bias,
        }
        return tensors, scale.float()[:, spread] * q + bias.float()[:, spread]

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        return {"group_size": self.group_size, "bits": self.bits}


# NF4 has quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E); FP4 has a sign,
# two bits of exponent and one of fraction, over twelve.
_CODES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class Bits4:
    """bitsandbytes' 4 bits: w = code[q] · absmax[block], the first of a pair in the high half.

    `nested`: the absmax are 8-bit codes of their own with a mean taken off (double quantization).
    """

    kind: str = "nf4"
    nested: bool = False
    blocksize: int = 64

    def __call__(self, outputs: int, inputs: int) -> Packed:
        count = outputs * inputs
        q, code = integers(4, count), torch.tensor(_CODES[self.kind])
        state: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.blocksize,
            "dtype": "float16",
            "shape": [outputs, inputs],
        }
        absmax = scales(count // self.blocksize).float()
        tensors = {
            "weight": (q[0::2] << 4 | q[1::2]).to(torch.uint8)[:, None],
            "weight.quant_map": code,
            "weight.absmax": absmax,
        }
        if self.nested:
            stored, nested_code = integers(8, len(absmax)), torch.linspace(-1, 1, 256)
            outer = scales(-(-len(absmax) // 256)).float()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
            absmax = nested_code[stored] * outer.repeat_interleave(256)[: len(absmax)] + 0.25
            tensors |= {
                "weight.absmax": stored.to(torch.uint8),
                "weight.nested_quant_map": nested_code,
                "weight.nested_absmax": outer,
            }
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{self.kind}"] = text
        return tensors, (code[q] * absmax.repeat_interleave(self.blocksize)).view(outputs, inputs)

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.nested,
            "bnb_4bit_compute_dtype": "float16",
        }


@dataclass(frozen=True, slots=True)
class Bits8:
    """bitsandbytes' LLM.int8(): w = q · SCB / 127, a scale for each output."""

    def __call__(self, outputs: int, inputs: int) -> Packed:
        q = integers(8, outputs, inputs, lowest=1) - 128
        largest = torch.rand(outputs) + 0.1
        plain_rows = torch.tensor(0, dtype=torch.uint8)
        tensors = {"weight": q.to(torch.int8), "SCB": largest, "weight_format": plain_rows}
        return tensors, q * largest[:, None] / 127

    @property
    def config(self) -> dict[str, Any]:
        """What the config says of it."""
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
