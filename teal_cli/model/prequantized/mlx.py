"""MLX's affine quantization, of linear modules and embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.prequantized.format import FLOATS, misfit, setting, stored_as, unpack
from teal_cli.model.tensor_files import TensorFiles

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class Mlx:
    """weight uint32 [out, in × bits / 32], scales and biases [out, G]: code × scale + bias."""

    group_size: int
    own_group_sizes: Mapping[str, int] = field(default_factory=dict)  # of some modules

    name: ClassVar[str] = "MLX"
    marks: ClassVar[tuple[str, ...]] = ("scales",)
    parts: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Mlx:
        """Of config.json's `quantization`, where modules may have settings of their own.

        Raises:
            UnsupportedError: a mode is another one than affine, or a setting is out of range.
        """
        own = {name: own for name, own in settings.items() if isinstance(own, Mapping)}
        for chosen in (settings, *own.values()):
            mode = chosen.get("mode", "affine")
            if mode != "affine":
                raise UnsupportedError(
                    f"this checkpoint is quantized already (MLX in the {mode!r} mode); "
                    "teal decodes affine"
                )
            setting(chosen, "bits", 4, *_BITS, format="MLX")
        size = setting(settings, "group_size", 64, 32, 64, 128, format="MLX")
        sizes = {
            name: setting(chosen, "group_size", size, 32, 64, 128, format="MLX")
            for name, chosen in own.items()
        }
        return cls(size, sizes)

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        _, in_features, out_features = self._layout(module, files)
        return out_features, in_features

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        bits, in_features, out_features = self._layout(module, files)
        out = unpack(files.read(f"{module}.weight"), bits)[:, :in_features].float()
        grouped = out.view(out_features, -1, self._group_size(module))
        grouped *= files.read(f"{module}.scales").unsqueeze(-1)
        grouped += files.read(f"{module}.biases").unsqueeze(-1)
        return out

    def _group_size(self, module: str) -> int:
        return self.own_group_sizes.get(module, self.group_size)

    def _layout(self, module: str, files: TensorFiles) -> tuple[int, int, int]:
        """Bits, in_features and out_features; the tensors give the bits."""
        shapes = [files.shape(f"{module}.{part}") for part in self.parts]
        if any(len(shape) != 2 for shape in shapes):
            raise misfit(module, files, *self.parts)
        (out_features, words), (rows, groups), biases = shapes
        if files.dtypes[f"{module}.weight"] != "U32":  # as MLX itself insists
            stored = files.dtypes[f"{module}.weight"]
            raise UnsupportedError(
                f"this checkpoint is quantized already, but {module}.weight is stored as {stored} "
                "where MLX packs its integers in U32"
            )
        in_features = groups * self._group_size(module)
        bits = words * 32 // max(in_features, 1)
        fits = rows == out_features and biases == (rows, groups) and bits in _BITS
        fits = fits and stored_as(files, module, scales=FLOATS, biases=FLOATS)
        if not fits or bits * in_features != words * 32:
            raise misfit(module, files, *self.parts)
        return bits, in_features, out_features
