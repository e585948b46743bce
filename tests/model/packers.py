"""Matrices as other programs store them quantized, packed here from the formats' descriptions.

Each packer draws codes and scales, and returns the floats that they stand for with the parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_F32, _BF16, _E8 = torch.float32, torch.bfloat16, torch.float8_e8m0fnu
Packed = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint says that it is quantized, and how it stores a matrix of [out, in]."""

    pack: Callable[[int, int], Packed]
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    embeddings: bool = False  # the embedding and the lm_head are stored this way too


def words(values: Tensor, bits: int, dtype: Any = np.int32) -> Tensor:
    """[rows, n] of unsigned integers, bit after bit (lowest first), as 32-bit words of a row."""
    spread = (values.numpy()[..., None].astype(np.int64) >> np.arange(bits)) & 1
    row_bits = spread.reshape(len(values), -1)
    row_bits = np.pad(row_bits, ((0, 0), (0, -row_bits.shape[1] % 32)))
    packed = np.packbits(row_bits.astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32).view(dtype))


def draw(rows: int, columns: int, bits: int, low: int = 0) -> Tensor:
    return torch.randint(low, low + (1 << bits), (rows, columns))


def scales_of(rows: int, columns: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(rows, columns) * 0.02 + 0.005).to(dtype)


def gptq(bits: int, group: int, *, act_order: bool = False, less: str = "each") -> Any:
    def pack(out: int, inputs: int) -> Packed:
        size = inputs if group == -1 else group
        groups, index = -(-inputs // size), torch.arange(inputs) // size
        if act_order:
            index = index[torch.randperm(inputs)]
        codes, zeros = draw(inputs, out, bits), draw(groups, out, bits)
        scales = scales_of(groups, out)
        stored = words((zeros - 1) % (1 << bits) if less == "each" else zeros, bits)
        if less == "words":
            stored -= sum(1 << shift for shift in range(0, 32, bits))
        weight = (codes - zeros[index]) * scales.float()[index]
        return weight.T, {
            "qweight": words(codes.T, bits).T,
            "qzeros": stored,
            "scales": scales,
            "g_idx": index.int(),
        }

    return pack


def without(pack: Any, *parts: str) -> Any:
    def fewer(out: int, inputs: int) -> Packed:
        weight, stored = pack(out, inputs)
        return weight, {name: tensor for name, tensor in stored.items() if name not in parts}

    return fewer


def awq(out: int, inputs: int, group: int = 16) -> Packed:
    codes, zeros = draw(inputs, out, 4), draw(inputs // group, out, 4)
    scales = scales_of(inputs // group, out)
    weight = (codes - zeros.repeat_interleave(group, 0)) * scales.float().repeat_interleave(
        group, 0
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map: which column each nibble holds

    def interleaved(values: Tensor) -> Tensor:
        return words(values.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    parts = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales}
    return weight.T, parts


def compressed(bits: int, group: int | None, **kinds: bool) -> Any:
    """`group` columns a scale, -1 for a scale a row, None for one in all."""

    def pack(out: int, inputs: int) -> Packed:
        groups = inputs // group if group and group > 0 else 1
        low = -(1 << (bits - 1))
        codes = draw(out, inputs, bits, low)
        scales = scales_of(1 if group is None else out, groups, torch.bfloat16)
        index = torch.arange(inputs) * groups // inputs
        parts = {"weight_packed": words(codes - low, bits)}
        parts["weight_shape"] = torch.tensor([out, inputs])
        if kinds.get("unordered"):
            parts["weight_g_idx"] = torch.full((inputs,), -1, dtype=torch.int32)
        if kinds.get("act_order"):
            index = index[torch.randperm(inputs)]
            parts["weight_g_idx"] = index.int()
        zeros = torch.zeros(len(scales), groups, dtype=torch.int64)
        if kinds.get("asymmetric"):
            zeros = draw(len(scales), groups, bits, low)
            packed = words((zeros - low).T, bits).T
            parts["weight_zero_point"] = zeros[0].to(torch.int8) if group is None else packed
        weight = (codes - zeros[:, index]) * scales.float()[:, index]
        return weight, parts | {"weight_scale": scales[0] if group is None else scales}

    return pack


def int8_rows(out: int, inputs: int) -> Packed:
    codes, zeros = draw(out, inputs, 8, -128), draw(out, 1, 8, -128)
    scales = scales_of(out, 1, torch.bfloat16)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scales}
    parts["weight_zero_point"] = zeros.to(torch.int8)
    return (codes - zeros) * scales.float(), parts


def fp8(
    shape: Callable[[int, int], tuple[int, ...]], name: str, dtype: torch.dtype, columns: int = 24
) -> Any:
    """`shape` of the factors; where a row has several, blocks of 32 × `columns`."""

    def pack(out: int, inputs: int) -> Packed:
        codes = torch.randn(out, inputs).to(torch.float8_e4m3fn)
        factors = torch.rand(shape(out, inputs)) * 0.2 + 0.05
        if dtype in (_E8, torch.uint8):
            factors = 2.0 ** torch.randint(-4, 0, factors.shape)
        exponents = factors.log2() + 127
        stored = exponents.to(dtype) if dtype == torch.uint8 else factors.to(dtype)
        table = factors if dtype == torch.uint8 else stored.float()
        if stored.ndim == 2 and stored.shape[1] > 1:
            table = table.repeat_interleave(32, 0).repeat_interleave(columns, 1)[:out, :inputs]
        weight = codes.float() * table
        return weight, {"weight": codes, name: stored, "input_scale": torch.ones(1)}

    return pack


def blocks(out: int, inputs: int, columns: int = 24) -> tuple[int, int]:
    return -(-out // 32), -(-inputs // columns)


def mlx(bits: int, group: int) -> Any:
    def pack(out: int, inputs: int) -> Packed:
        codes = draw(out, inputs, bits)
        scales = scales_of(out, inputs // group, torch.bfloat16)
        biases = torch.randn(out, inputs // group).mul(0.05).to(torch.bfloat16)
        grouped = codes.unflatten(1, (-1, group)) * scales.float()[..., None]
        weight = (grouped + biases.float()[..., None]).flatten(1)
        packed = words(codes, bits, np.uint32)
        return weight, {"weight": packed, "scales": scales, "biases": biases}

    return pack


def bnb4(kind: str, *, nested: bool = False, block: int = 64) -> Any:
    def pack(out: int, inputs: int) -> Packed:
        count = out * inputs
        codes, table = torch.randint(0, 16, (count,)), torch.linspace(-1, 1, 16)
        largest = torch.rand(-(-count // block)) * 0.2 + 0.05
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16"}
        state["shape"] = [out, inputs]
        parts = {"weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]}
        parts |= {"weight.absmax": largest, "weight.quant_map": table}
        if nested:
            stored = torch.randint(0, 256, largest.shape).to(torch.uint8)
            outer, inner = torch.rand(-(-len(stored) // 8)), torch.linspace(0, 1, 256) * 0.1
            largest = inner[stored.long()] * outer.repeat_interleave(8)[: len(stored)] + 0.25
            state |= {"nested_blocksize": 8, "nested_offset": 0.25, "nested_dtype": "float32"}
            parts["weight.absmax"] = stored
            parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": inner}
        text = list(json.dumps(state).encode())
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(text, dtype=torch.uint8)
        weight = table[codes] * largest.repeat_interleave(block)[:count]
        return weight.view(out, inputs), parts

    return pack


def bnb8(out: int, inputs: int) -> Packed:
    codes, largest = draw(out, inputs, 8, -128), torch.rand(out) * 2
    parts = {"weight": codes.to(torch.int8), "SCB": largest}
    parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return codes * largest[:, None] / 127, parts


def _of(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


def _ct(layout: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return _of("compressed-tensors", format=layout, config_groups=groups, ignore=["lm_head"])


_MLX = {"group_size": 32, "bits": 4}
_LOAD4 = _of("bitsandbytes", load_in_4bit=True)
LAYOUTS = {
    "gptq": Layout(gptq(4, 16), _of("gptq", bits=4, group_size=16, sym=False)),
    "gptq-8-bits": Layout(gptq(8, 16), _of("gptq", bits=8, group_size=16)),
    "gptq-2-bits": Layout(gptq(2, 16), _of("gptq", bits=2, group_size=16)),
    "gptq-3-bits": Layout(gptq(3, 32), _of("gptq", bits=3, group_size=32)),
    "gptq-act-order": Layout(
        gptq(4, 16, act_order=True), _of("gptq", bits=4, group_size=16, desc_act=True)
    ),
    "gptq-channel": Layout(gptq(4, -1), _of("gptq", bits=4, group_size=-1)),
    "gptq-without-g_idx": Layout(  # with a short last group
        without(gptq(4, 40), "g_idx"), _of("gptq", bits=4, group_size=40)
    ),
    "gptq-v2": Layout(
        gptq(4, 16, less="no"), _of("gptq", bits=4, group_size=16, checkpoint_format="gptq_v2")
    ),
    "gptq-by-gptqmodel": Layout(
        gptq(4, 16, less="words"),
        _of("gptq", bits=4, group_size=16, meta={"quantizer": ["gptqmodel:4.0"]}),
    ),
    "gptq-other-bits": Layout(gptq(8, 16), _of("gptq", bits=4, group_size=16)),
    "gptq-2023": Layout(gptq(4, -1), files={"quantize_config.json": {"bits": 4, "group_size": -1}}),
    "gptq-lm_head": Layout(gptq(4, 16), _of("gptq", bits=4, group_size=16), embeddings=True),
    "awq": Layout(awq, _of("awq", bits=4, group_size=16, version="gemm", zero_point=True)),
    "awq-2023": Layout(
        awq, files={"quant_config.json": {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}}
    ),
    "ct-int4": Layout(compressed(4, 16), _ct("pack-quantized", num_bits=4, group_size=16)),
    "ct-int8": Layout(compressed(8, 16), _ct("pack-quantized", num_bits=8, group_size=16)),
    "ct-channel": Layout(compressed(4, -1), _ct("pack-quantized", num_bits=4)),
    "ct-tensor": Layout(compressed(8, None), _ct("pack-quantized", num_bits=8)),
    "ct-asymmetric": Layout(
        compressed(4, 16, asymmetric=True), _ct("pack-quantized", num_bits=4, group_size=16)
    ),
    "ct-tensor-asymmetric": Layout(
        compressed(8, None, asymmetric=True), _ct("pack-quantized", num_bits=8)
    ),
    "ct-act-order": Layout(
        compressed(4, 16, act_order=True, asymmetric=True),
        _ct("pack-quantized", num_bits=4, group_size=16, actorder="group"),
    ),
    "ct-order-unset": Layout(
        compressed(4, 16, unordered=True), _ct("pack-quantized", num_bits=4, group_size=16)
    ),
    "ct-older-key": Layout(
        compressed(4, 16), {"compression_config": _ct("pack-quantized")["quantization_config"]}
    ),
    "ct-int8-rows": Layout(int8_rows, _ct("int-quantized", num_bits=8)),
    "ct-fp8-tensor": Layout(
        fp8(lambda o, i: (1,), "weight_scale", _BF16), _ct("float-quantized", num_bits=8)
    ),
    "ct-fp8-rows": Layout(
        fp8(lambda o, i: (o, 1), "weight_scale", _BF16), _ct("naive-quantized", num_bits=8)
    ),
    "ct-fp8-blocks": Layout(
        fp8(blocks, "weight_scale", _BF16),
        _ct("float-quantized", num_bits=8, strategy="block", block_structure=[32, 24]),
    ),
    "fp8-blocks": Layout(
        fp8(blocks, "weight_scale_inv", _F32), _of("fp8", weight_block_size=[32, 24])
    ),
    "fp8-short-blocks": Layout(  # at the right edge, where a row's groups would divide evenly
        fp8(lambda o, i: blocks(o, i, 40), "weight_scale_inv", _F32, 40),
        _of("fp8", weight_block_size=[32, 40]),
    ),
    "fp8-powers-of-two": Layout(
        fp8(blocks, "weight_scale_inv", _E8),
        _of("fp8", weight_block_size=[32, 24], scale_fmt="ue8m0"),
    ),
    "fp8-exponents": Layout(
        fp8(blocks, "weight_scale_inv", torch.uint8), _of("fp8", weight_block_size=[32, 24])
    ),
    "fp8-tensor": Layout(
        fp8(lambda o, i: (), "weight_scale_inv", _BF16), _of("fp8", activation_scheme="static")
    ),
    "fbgemm-fp8": Layout(fp8(lambda o, i: (o, 1), "weight_scale", _F32), _of("fbgemm_fp8")),
    "mlx": Layout(mlx(4, 32), {"quantization": _MLX}, embeddings=True),
    "mlx-both-keys": Layout(mlx(4, 32), {"quantization_config": _MLX}, embeddings=True),
    **{
        f"mlx-{bits}-bits": Layout(mlx(bits, 32), {"quantization": {**_MLX, "bits": bits}})
        for bits in (2, 3, 5, 6, 8)
    },
    "bnb-nf4": Layout(bnb4("nf4"), _LOAD4),
    "bnb-nf4-nested": Layout(bnb4("nf4", nested=True), _LOAD4),
    "bnb-fp4-ragged": Layout(bnb4("fp4", block=4096), _LOAD4),
    "bnb-int8": Layout(bnb8, _of("bitsandbytes", load_in_8bit=True)),
}
