"""bitsandbytes: 4-bit codes into a table (nf4, fp4) with a largest value a block; int8 by rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.config import DAMAGED
from teal_cli.model.prequantized.format import FLOATS, misfit, stored_as
from teal_cli.model.tensor_files import TensorFiles

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """4 bits: bytes of two codes, the high half first; the state in JSON gives shape and blocks.

    The blocks' largest values (`absmax`) may be quantized themselves, to 8 bits with a table,
    blocks and an offset of their own. 8 bits: weight int8 [out, in] and SCB [out], each row's
    largest value, which 127 stands for.
    """

    name: ClassVar[str] = "bitsandbytes"
    marks: ClassVar[tuple[str, ...]] = ("SCB", "weight.absmax")
    parts: ClassVar[tuple[str, ...]] = (
        "weight",
        "SCB",
        "weight_format",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *_STATES,
    )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> BitsAndBytes:
        """Of a quantization_config; what counts lies beside each matrix."""
        return cls()

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        if f"{module}.SCB" in files:
            return _rows_shape(module, files)
        state = _state(module, files)
        out_features, in_features = state["shape"]
        blocks = -(-out_features * in_features // state["blocksize"])
        expected = {"weight.absmax": (blocks,), "weight.quant_map": (16,)}
        dtypes = {"weight.absmax": f"{FLOATS} U8", "weight.quant_map": FLOATS}
        if files.dtypes[f"{module}.weight.absmax"] == "U8":  # quantized itself
            expected["weight.nested_absmax"] = (-(-blocks // state["nested_blocksize"]),)
            expected["weight.nested_quant_map"] = (256,)
            dtypes |= dict.fromkeys(("weight.nested_absmax", "weight.nested_quant_map"), FLOATS)
        fits = all(files.shape(f"{module}.{part}") == shape for part, shape in expected.items())
        if not fits or not stored_as(files, module, **dtypes):
            raise misfit(module, files, "weight", *expected)
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        weight = files.read(f"{module}.weight")
        if f"{module}.SCB" in files:
            largest = files.read(f"{module}.SCB").float()
            return weight.float().mul_(largest[:, None]).div_(127)
        state = _state(module, files)
        count = state["shape"][0] * state["shape"][1]
        pairs = weight.contiguous().view(torch.uint8).flatten()
        if len(pairs) != -(-count // 2):
            raise misfit(module, files, "weight")
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).flatten()
        values = files.read(f"{module}.weight.quant_map").float()[codes.int()]
        values = _times_blocks(values, _absmax(module, state, files), state["blocksize"])
        return values[:count].view(state["shape"])


def _rows_shape(module: str, files: TensorFiles) -> tuple[int, int]:
    weight, rows = files.shape(f"{module}.weight"), files.shape(f"{module}.SCB")
    fits = stored_as(files, module, weight="I8", SCB=FLOATS)
    if not fits or len(weight) != 2 or rows != weight[:1]:
        raise misfit(module, files, "weight", "SCB")
    order = f"{module}.weight_format"
    if order in files and files.read(order).any():
        raise UnsupportedError(
            f"this checkpoint is quantized already (bitsandbytes), and {module}.weight lies as "
            "the GPU's tensor cores want it; teal decodes rows"
        )
    return weight[0], weight[1]


def _absmax(module: str, state: Mapping[str, Any], files: TensorFiles) -> Tensor:
    """The largest value of each block, float32."""
    stored = files.read(f"{module}.weight.absmax")
    if stored.dtype != torch.uint8:
        return stored.float()
    table = files.read(f"{module}.weight.nested_quant_map").float()
    largest = files.read(f"{module}.weight.nested_absmax").float()
    values = table[stored.int()]
    return _times_blocks(values, largest, state["nested_blocksize"]) + state["nested_offset"]


def _times_blocks(values: Tensor, largest: Tensor, size: int) -> Tensor:
    """Each block of `size` values times its largest; the last block may be short."""
    whole = len(values) // size * size
    values[:whole].view(-1, size).mul_(largest[: whole // size, None])
    values[whole:] *= largest[-1]
    return values


def _state(module: str, files: TensorFiles) -> dict[str, Any]:
    """shape, blocksize and what else the JSON beside a matrix says, checked."""
    for part in _STATES:
        if f"{module}.{part}" in files:
            break
    else:
        raise UnsupportedError(
            f"this checkpoint is quantized already (bitsandbytes), but lacks {module}."
            "weight.quant_state, without which it cannot be decoded"
        )
    try:
        state = json.loads(bytes(files.read(f"{module}.{part}").tolist()))
        out_features, in_features = (int(n) for n in state["shape"])
        nested = "nested_blocksize" in state
        sizes = [int(state["blocksize"]), int(state["nested_blocksize"]) if nested else 1]
        offset = float(state["nested_offset"]) if nested else 0.0
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TealError(f"{module}.{part} is damaged: {error!r}", hint=DAMAGED) from None
    if min(out_features, in_features, *sizes) < 1:
        raise TealError(f"{module}.{part} is damaged: {state}", hint=DAMAGED)
    return {
        "shape": (out_features, in_features),
        "blocksize": sizes[0],
        "nested_blocksize": sizes[1],
        "nested_offset": offset,
    }
