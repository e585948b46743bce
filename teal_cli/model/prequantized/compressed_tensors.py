"""compressed-tensors, which llm-compressor writes: packed integers, or 8 bits with a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import (
    FLOATS,
    column_groups,
    dequantize,
    grouped_as,
    misfit,
    stored_as,
    unpack,
)
from teal_cli.model.prequantized.scaled import Scaled
from teal_cli.model.tensor_files import TensorFiles

_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
# At other widths the package itself packed in two ways over time.
_BITS = (2, 4, 8)
_PACKED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """weight_packed int32 [out, in × bits / 32], weight_scale [out, G], [out, 1] or [1].

    Codes and zero points are stored plus 2^(bits - 1); zero points int32 [out × bits / 32, G].
    Modules without weight_packed are `scaled` ones.
    """

    scaled: Scaled

    name: ClassVar[str] = "compressed-tensors"
    marks: ClassVar[tuple[str, ...]] = ("weight_packed", *Scaled.marks)
    parts: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*_PACKED, *Scaled.parts)))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> CompressedTensors:
        """Of a quantization_config or compression_config.

        Raises:
            UnsupportedError: it says that a matrix is stored in a format beyond those decoded.
        """
        groups = settings.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, Mapping) else []
        schemes = [scheme for scheme in schemes if isinstance(scheme, Mapping)]
        sparsity = settings.get("sparsity_config")
        layouts = [found.get("format") for found in (settings, sparsity, *schemes) if found]
        for layout in layouts:
            if layout is not None and layout not in _FORMATS:
                raise UnsupportedError(
                    f"this checkpoint is quantized already (compressed-tensors, {layout}); "
                    f"teal decodes {', '.join(_FORMATS[1:-1])}"
                )
        if settings.get("transform_config"):
            raise UnsupportedError(
                "this checkpoint is quantized already (compressed-tensors), with rotations "
                "(transform_config) that teal does not apply"
            )
        weights = [scheme.get("weights") for scheme in schemes]
        blocks = [found.get("block_structure") for found in weights if isinstance(found, Mapping)]
        for block in blocks:
            if isinstance(block, list) and block:
                block_size = Scaled.from_settings({"weight_block_size": block}).block
                return cls(Scaled(cls.name, block_size))
        return cls(Scaled(cls.name))

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        if f"{module}.weight_packed" not in files:
            return self.scaled.shape(module, files)
        _, in_features, out_features = self._layout(module, files)
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        if f"{module}.weight_packed" not in files:
            return self.scaled.decode(module, files)
        bits, in_features, out_features = self._layout(module, files)
        middle = 1 << (bits - 1)
        codes = unpack(files.read(f"{module}.weight_packed"), bits)[:, :in_features].float()
        scales = files.read(f"{module}.weight_scale").float()
        scales = scales if scales.ndim == 2 else scales.reshape(-1, 1)
        name, zeros = f"{module}.weight_zero_point", None
        if name in files and files.dtypes[name] == "I32":
            packed = unpack(files.read(name).T.contiguous(), bits)[:, :out_features]
            zeros = packed.T.float() - middle
        elif name in files:
            zeros = files.read(name).float().reshape(scales.shape)
        group_of = column_groups(module, files, scales.shape[1])
        return dequantize(codes - middle, scales, zeros, group_of)

    def _layout(self, module: str, files: TensorFiles) -> tuple[int, int, int]:
        """Bits, in_features and out_features; the words of a row give the bits."""
        packed, scale = f"{module}.weight_packed", files.shape(f"{module}.weight_scale")
        words, stored = files.shape(packed), files.dtypes[packed]
        if stored != "I32" or f"{module}.weight_global_scale" in files:
            raise UnsupportedError(
                f"this checkpoint is quantized already, with {packed} of a kind that teal does "
                f"not decode ({stored})"
            )
        size = files.shape(f"{module}.weight_shape")
        if size != (2,) or len(words) != 2 or len(scale) > 2:
            raise misfit(module, files, *_PACKED)
        out_features, in_features = (int(n) for n in files.read(f"{module}.weight_shape"))
        bits = words[1] * 32 // max(in_features, 1)
        fits = bits in _BITS and words == (out_features, -(-in_features * bits // 32))
        rows, groups = scale if len(scale) == 2 else (*scale, 1, 1)[:2]
        if (zero := f"{module}.weight_zero_point") in files:
            packed_zero = (-(-out_features * bits // 32), groups)
            is_packed = files.dtypes[zero] == "I32"
            fits = fits and files.shape(zero) == (packed_zero if is_packed else scale)
        fits = fits and grouped_as(module, files, in_features)
        fits = fits and stored_as(
            files, module, weight_scale=FLOATS, weight_zero_point=f"{FLOATS} I8 I32"
        )
        fits = fits and rows in (1, out_features) and groups > 0
        if not fits or in_features % groups:
            raise misfit(module, files, *_PACKED)
        return bits, in_features, out_features
