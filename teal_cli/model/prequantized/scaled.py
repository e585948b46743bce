"""8-bit floats and integers with a scale for the tensor, a row, a group of columns or a block.

FP8 as DeepSeek, Qwen3, FBGEMM and AutoFP8 store it; compressed-tensors' unpacked formats.
How activations are to be rounded is left aside: teal decodes weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import (
    FLOATS,
    column_groups,
    dequantize,
    grouped_as,
    misfit,
    stored_as,
)
from teal_cli.model.tensor_files import TensorFiles

_DTYPES = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True, slots=True)
class Scaled:
    """weight [out, in] in 8 bits, and a factor called weight_scale or weight_scale_inv.

    `block` is the (rows, columns) that share a factor where it comes in blocks.
    """

    name: str
    block: tuple[int, int] | None = None

    marks: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_scale_inv")
    parts: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "activation_scale",
        "output_scale",
    )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Scaled:
        """Of a quantization_config of the methods fp8 and fbgemm_fp8."""
        block = settings.get("weight_block_size")
        sizes = block if isinstance(block, list) else []
        if len(sizes) == 2 and all(isinstance(size, int) and size > 0 for size in sizes):
            return cls("FP8", (int(sizes[0]), int(sizes[1])))
        if block is not None:
            raise UnsupportedError(
                f"this checkpoint is quantized already (FP8) with weight_block_size {block!r}"
            )
        return cls("FP8")

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        self._blocks(module, files)
        out_features, in_features = files.shape(f"{module}.weight")
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        rows, columns = self._blocks(module, files)
        out = files.read(f"{module}.weight").to(torch.float32, copy=True)
        scale = _by_row(_factors(files.read(_scale(module, files))), rows, len(out))
        zero = torch.zeros(1, 1)
        if f"{module}.weight_zero_point" in files:
            stored = files.read(f"{module}.weight_zero_point").float()
            zero = _by_row(stored, rows, len(out))
        zero = zero.expand(-1, scale.shape[1])
        if (group_of := column_groups(module, files, scale.shape[1])) is not None:
            return dequantize(out, scale, zero, group_of)
        for i, piece in enumerate(out.split(columns, dim=1)):
            piece -= zero[:, i, None]
            piece *= scale[:, i, None]
        return out

    def _blocks(self, module: str, files: TensorFiles) -> tuple[int, int]:
        """Rows and columns of a block; a factor for each row counts as one block of them all."""
        weight, scale = files.shape(f"{module}.weight"), files.shape(_scale(module, files))
        stored = files.dtypes[f"{module}.weight"]
        if stored not in _DTYPES:
            raise UnsupportedError(
                f"this checkpoint is quantized already ({self.name}), but {module}.weight is "
                f"stored as {stored}; teal decodes {', '.join(_DTYPES)}"
            )
        if len(weight) != 2 or len(scale) > 2:
            raise misfit(module, files, *self.parts[:3])
        out_features, in_features = weight
        down, across = scale if len(scale) == 2 else (*scale, 1, 1)[:2]
        zero = f"{module}.weight_zero_point"
        fits = zero not in files or files.shape(zero) in (scale, (1,), ())
        fits = fits and grouped_as(module, files, in_features)
        fits = fits and stored_as(
            files,
            module,
            weight_scale=FLOATS,
            weight_scale_inv=f"{FLOATS} F8_E8M0 U8",
            weight_zero_point=f"{FLOATS} I8",
        )
        if fits and self.block is not None:
            rows, columns = self.block
            if (down, across) == (-(-out_features // rows), -(-in_features // columns)):
                return rows, columns
        if fits and down in (1, out_features) and across and not in_features % across:
            return out_features, in_features // across
        raise misfit(module, files, *(part for part in self.parts if f"{module}.{part}" in files))


def _scale(module: str, files: TensorFiles) -> str:
    inverse = f"{module}.weight_scale_inv"  # DeepSeek's name for a factor
    return inverse if inverse in files else f"{module}.weight_scale"


def _factors(scale: Tensor) -> Tensor:
    """In float32; a byte is the exponent of a power of two (E8M0)."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _by_row(values: Tensor, rows: int, out_features: int) -> Tensor:
    """[out_features or 1, across] of what is given for the tensor, each row, or bands of rows."""
    table = values if values.ndim == 2 else values.reshape(-1, 1)
    if len(table) in (1, out_features):
        return table
    return table.repeat_interleave(rows, dim=0)[:out_features]
