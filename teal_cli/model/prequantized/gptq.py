"""GPTQ, as AutoGPTQ and GPTQModel store it: integers packed down the columns of [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import (
    check_groups,
    dequantize,
    misfit,
    setting,
    unpack,
)
from teal_cli.model.tensor_files import TensorFiles

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Gptq:
    """qweight int32 [in × bits / 32, out], scales [G, out], qzeros [G, out × bits / 32].

    `g_idx` [in] names each input's group: with act-order they are not one after another. The
    first version of the format stores zero points less one (modulo 2^bits), gptq_v2 themselves.
    """

    bits: int
    zero_offset: int

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
        return cls(bits, 0 if packing == "gptq_v2" else 1)

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        _, in_features, out_features = self._layout(module, files)
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        bits, in_features, _ = self._layout(module, files)
        codes = unpack(files.read(f"{module}.qweight").T.contiguous(), bits)
        zeros = unpack(files.read(f"{module}.qzeros"), bits)
        zeros = zeros.add_(self.zero_offset).bitwise_and_((1 << bits) - 1)
        scales = files.read(f"{module}.scales").float()
        one_after_another = torch.arange(in_features) // -(-in_features // len(scales))
        group_of = one_after_another
        if (name := f"{module}.g_idx") in files:
            group_of = check_groups(name, files.read(name).long(), len(scales))
        if group_of.equal(one_after_another) and in_features % len(scales) == 0:
            return dequantize(codes, scales.T, zeros.T)
        return dequantize(codes, scales.T, zeros.T, group_of)

    def _layout(self, module: str, files: TensorFiles) -> tuple[int, int, int]:
        """Bits, in_features and out_features; where g_idx counts the inputs, it gives the bits."""
        parts = ("qweight", "qzeros", "scales")
        shapes = [files.shape(f"{module}.{part}") for part in parts]
        if any(len(shape) != 2 for shape in shapes):
            raise misfit(module, files, *parts)
        (words, out_features), (groups, zero_words), scales = shapes
        in_features = words * 32 // self.bits
        if f"{module}.g_idx" in files:  # GPTQModel gives some modules other bits
            in_features = files.shape(f"{module}.g_idx")[0]
        bits = words * 32 // max(in_features, 1)
        fits = bits in _BITS and bits * in_features == words * 32
        fits = fits and scales == (groups, out_features) and zero_words * 32 == out_features * bits
        if not fits or not 1 <= groups <= in_features:
            raise misfit(module, files, *self.parts)
        return bits, in_features, out_features
