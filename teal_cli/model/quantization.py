"""Which of a decoder's matrices are integers, and of what kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows
from torch import Tensor

from teal_cli.errors import UnsupportedError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.shards import Stored
from teal_cli.model.sites import FUSED

# Rows or columns that are rounded at a time: rounding holds a few float32 copies of them.
_BLOCK = 1024
_MULTIPLE = 8  # of columns, that rows of integers need

Quantized = QuantizedMatrix | QuantizedRows


@dataclass(frozen=True, slots=True)
class Quantization:
    """The projections as integers, and the lm_head as int8 if `head` is set.

    An output has a scale. In int4, `group` neighbouring outputs of an input channel share a second
    scale and an offset; the last group of a row may be smaller. Embedding, norms and biases stay
    in the checkpoint's dtype.
    """

    group: int = 0  # 0 is int8
    head: bool = False

    @property
    def name(self) -> str:
        """As the user writes it: a key of QUANTIZATIONS."""
        return next(name for name, known in QUANTIZATIONS.items() if known == self)

    def row_bytes(self, columns: int) -> int:
        """Bytes of one input channel's weights, all that skipping it saves."""
        if not self.group:
            return columns
        return columns // 2 + 4 * -(-columns // self.group)

    def scale_bytes(self, columns: int) -> int:
        """Bytes of a matrix outside its rows: a float32 scale an output."""
        return 4 * columns

    def quantizes(self, name: str) -> bool:
        """Whether the tensor of this name in a checkpoint is stored as integers."""
        kind = name.rpartition(".")[2]
        return kind in FUSED or (kind == "lm_head" and self.head)

    def check(self, config: ModelConfig) -> None:
        """Make sure that a model's matrices can be stored like this.

        Raises:
            UnsupportedError: the outputs of one are not a multiple of 8.
        """
        for kind, (_, outputs) in config.matrix_shapes.items():
            if outputs % _MULTIPLE:
                raise UnsupportedError(
                    f"{self.name} needs matrices with a multiple of {_MULTIPLE} outputs, and "
                    f"{kind} of this model has {outputs}"
                )

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Stored]:
        """What the files hold of a tensor that is quantized; its scales come first.

        An odd number of bytes could otherwise put them where no float may begin.
        """
        outputs = shape[0] if name == "lm_head" else shape[1]
        rows = Stored(shape, torch.int8)
        if self.group and name != "lm_head":
            rows = Stored((shape[0], self.row_bytes(outputs)), torch.uint8)
        return {_scales(name): Stored((outputs,), torch.float32), name: rows}

    def load(self, name: str, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """The tensor of this name out of what the files hold; `columns` is its last size."""
        rows, scales = tensors[name], tensors[_scales(name)]
        if name == "lm_head":
            return QuantizedRows(rows, scales)
        return QuantizedMatrix(rows, scales, columns, self.group)

    def round(self, name: str, weight: Tensor) -> Quantized:
        """Round the tensor of this name in a checkpoint to the nearest integers."""
        if name == "lm_head":
            return QuantizedRows.int8(weight)
        if self.group:
            return QuantizedMatrix.int4(weight, self.group)
        parts = [QuantizedMatrix.int8(columns) for columns in weight.split(_BLOCK, dim=1)]
        rows = torch.cat([part.rows for part in parts], dim=1)
        scales = torch.cat([part.scales for part in parts])
        return QuantizedMatrix(rows, scales, weight.shape[1], 0)


# "+head" is the lm_head in int8 too.
QUANTIZATIONS = {
    "int8": Quantization(),
    "int8+head": Quantization(head=True),
    "int4": Quantization(64),
    "int4+head": Quantization(64, head=True),
    "int4-128": Quantization(128),
    "int4-128+head": Quantization(128, head=True),
}


def quantization(name: str | None) -> Quantization | None:
    """What a name stands for; None is none.

    Raises:
        UsageError: there is no such quantization.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise UsageError(
            f"there is no quantization {name!r}", hint=f"There are: {', '.join(QUANTIZATIONS)}."
        )
    return QUANTIZATIONS[name]


def tensors_of(quantized: Quantized) -> list[Tensor]:
    """What is stored of it, in the order of `Quantization.stored`."""
    return [quantized.scales, quantized.rows]


def _scales(name: str) -> str:
    return f"{name}.scales"
