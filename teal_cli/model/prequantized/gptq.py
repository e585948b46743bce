"""GPTQ, as AutoGPTQ and GPTQModel store it: integers packed down the columns of [in, out]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import (
    FLOATS,
    check_groups,
    dequantize,
    misfit,
    setting,
    stored_as,
    unpack,
)
from teal_cli.model.tensor_files import TensorFiles

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq:
    """qweight int32 [in × bits / 32, out], scales [G, out], qzeros [G, out × bits / 32].

    `g_idx` [in] names each input's group: with act-order they are not one after another. The
    first version of the format stores zero points less one, gptq_v2 themselves. AutoGPTQ took the
    one from each (modulo 2^bits), GPTQModel from whole words, so that a zero borrows from the next.
    Symmetric files that call themselves of the first version may hold the second's zero points.
    """

    bits: int
    group_size: int  # -1: one group
    less_one: Literal["no", "each", "words"]
    symmetric: bool = False  # every zero point is the middle, 2^(bits - 1)

    name: ClassVar[str] = "GPTQ"
    marks: ClassVar[tuple[str, ...]] = ("qweight",)
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Gptq:
        """Of a quantization_config, or a quantize_config.json.

        Raises:
            UnsupportedError: the packing is of another kind.
        """
        packing = settings.get("checkpoint_format") or "gptq"
        if settings.get("is_marlin_format"):
            packing = "marlin"
        if packing not in ("gptq", "gptq_v2"):
            raise UnsupportedError(
                f"this checkpoint is quantized already (GPTQ in the {packing!r} layout); "
                "teal decodes gptq and gptq_v2"
            )
        bits = setting(settings, "bits", None, *_BITS, format="GPTQ")
        group = setting(settings, "group_size", -1, format="GPTQ")
        symmetric = settings.get("sym") is True
        if packing == "gptq_v2":
            return cls(bits, group, "no", symmetric)
        meta = settings.get("meta")
        by = str(meta.get("quantizer")) if isinstance(meta, Mapping) else ""
        if "gptqmodel" not in by:
            return cls(bits, group, "each", symmetric)
        if bits == 3:  # its versions take different amounts from 3-bit zero points
            raise UnsupportedError(
                "this checkpoint is quantized already (GPTQ of 3 bits by GPTQModel, in the "
                "'gptq' layout); teal decodes its gptq_v2"
            )
        return cls(bits, group, "words", symmetric)

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        _, in_features, out_features = self._layout(module, files)
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        bits, in_features, _ = self._layout(module, files)
        codes = unpack(files.read(f"{module}.qweight").T.contiguous(), bits)
        zeros = self._zeros(files.read(f"{module}.qzeros"), bits)
        scales = files.read(f"{module}.scales").float()
        if (name := f"{module}.g_idx") in files:
            group_of = files.read(name).long().flatten()
            check_groups(name, group_of, len(scales))
        else:
            group_of = torch.arange(in_features) // self._group_size(in_features)
        return dequantize(codes, scales.T, zeros.T, group_of)

    def _group_size(self, in_features: int) -> int:
        return self.group_size if self.group_size > 0 else in_features

    def _zeros(self, packed: Tensor, bits: int) -> Tensor:
        """Zero points, uint8 [G, out]."""
        stored = unpack(packed, bits)
        if self.less_one == "no" or (self.symmetric and stored.eq(1 << (bits - 1)).all()):
            return stored
        if self.less_one == "words":
            return unpack(packed + sum(1 << shift for shift in range(0, 32, bits)), bits)
        return stored.add_(1).bitwise_and_((1 << bits) - 1)

    def _layout(self, module: str, files: TensorFiles) -> tuple[int, int, int]:
        """Bits, in_features and out_features; where g_idx counts the inputs, it gives the bits."""
        parts = ("qweight", "qzeros", "scales")
        shapes = [files.shape(f"{module}.{part}") for part in parts]
        if any(len(shape) != 2 for shape in shapes):
            raise misfit(module, files, *parts)
        (words, out_features), (groups, zero_words), scales = shapes
        in_features = words * 32 // self.bits
        expected = -(-in_features // max(self._group_size(in_features), 1))
        if (index := f"{module}.g_idx") in files:  # GPTQModel gives some modules other bits
            in_features, expected = math.prod(files.shape(index)), groups
        bits = words * 32 // max(in_features, 1)
        fits = bits in _BITS and bits * in_features == words * 32
        fits = fits and scales == (groups, out_features) and zero_words * 32 == out_features * bits
        fits = fits and groups == expected and 1 <= groups <= in_features
        dtypes = {"qweight": "I32", "qzeros": "I32", "scales": FLOATS, "g_idx": "I32 I64"}
        fits = fits and stored_as(files, module, **dtypes)
        if not fits:
            raise misfit(module, files, *self.parts)
        return bits, in_features, out_features
