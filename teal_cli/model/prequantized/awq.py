"""AWQ in AutoAWQ's "gemm" layout: 4-bit integers packed along the rows of [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import (
    FLOATS,
    dequantize,
    misfit,
    setting,
    stored_as,
    unpack,
)
from teal_cli.model.tensor_files import TensorFiles

# Of eight columns in a word, where each one lies (4 bits a place).
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Awq:
    """qweight int32 [in, out / 8], scales [G, out], qzeros int32 [G, out / 8]."""

    name: ClassVar[str] = "AWQ"
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Awq:
        """Of a quantization_config, or a quant_config.json of 2023 (w_bit, q_group_size).

        Raises:
            UnsupportedError: the layout is another one than gemm.
        """
        layout = str(settings.get("version") or "gemm").lower()
        if layout != "gemm":
            raise UnsupportedError(
                f"this checkpoint is quantized already (AWQ in the {layout!r} layout); "
                "teal decodes gemm"
            )
        setting(settings, "w_bit" if "w_bit" in settings else "bits", 4, 4, format="AWQ")
        return cls()

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        shapes = [files.shape(f"{module}.{part}") for part in self.parts]
        if any(len(shape) != 2 for shape in shapes):
            raise misfit(module, files, *self.parts)
        (in_features, words), (groups, zero_words), scales = shapes
        fits = scales == (groups, words * 8) and zero_words == words
        fits = fits and stored_as(files, module, qweight="I32", qzeros="I32", scales=FLOATS)
        if not fits or not groups or in_features % groups:
            raise misfit(module, files, *self.parts)
        return words * 8, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        codes = _columns(files.read(f"{module}.qweight"))
        zeros = _columns(files.read(f"{module}.qzeros"))
        scales = files.read(f"{module}.scales").float()
        return dequantize(codes.T.contiguous(), scales.T, zeros.T)


def _columns(words: Tensor) -> Tensor:
    """uint8 [rows, 8 W] of int32 [rows, W], in the columns' order."""
    in_place = unpack(words, 4)[:, : words.shape[1] * 8]
    return in_place.unflatten(1, (-1, 8))[..., _PLACES].flatten(1)
