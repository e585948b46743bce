"""How a checkpoint is quantized, by what it says of itself; and what says nothing is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from teal_cli.errors import UnsupportedError
from teal_cli.model.config import read_object
from teal_cli.model.prequantized.awq import Awq
from teal_cli.model.prequantized.bitsandbytes import BitsAndBytes
from teal_cli.model.prequantized.compressed_tensors import CompressedTensors
from teal_cli.model.prequantized.format import Format
from teal_cli.model.prequantized.gptq import Gptq
from teal_cli.model.prequantized.mlx import Mlx
from teal_cli.model.prequantized.scaled import Scaled
from teal_cli.model.tensor_files import TensorFiles

# Where config.json says it: as transformers has it, as older llm-compressors and as MLX.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# Where AutoGPTQ and AutoAWQ said it in 2023, and the method that a file without its name means.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_METHODS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": Gptq.from_settings,
    "awq": Awq.from_settings,
    "compressed-tensors": CompressedTensors.from_settings,
    "fp8": Scaled.from_settings,
    "fbgemm_fp8": Scaled.from_settings,
    "mlx": Mlx.from_settings,
    "bitsandbytes": BitsAndBytes.from_settings,
}
_ORIGINAL = "Use the original float16 or bfloat16 checkpoint."
# Parts of matrices that are quantized, whatever the config says.
_SIGNS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".absmax",
    ".SCB",
    ".W_q",
    ".codebooks",
)


def format_of(config: Mapping[str, Any], folder: Path) -> Format | None:
    """The format of a folder's quantized matrices; None if it names none.

    Raises:
        UnsupportedError: teal does not decode it.
    """
    settings, usual = _settings(config, folder)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method is None and isinstance(settings, Mapping):
        method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else usual
        if method is None and {"bits", "group_size"} <= settings.keys():
            method = "mlx"  # mlx-lm writes its settings under both keys
    make = _METHODS.get(method) if isinstance(method, str) else None
    if make is None:
        raise UnsupportedError(
            f"this checkpoint is quantized already ({method or 'unknown method'}); "
            f"teal decodes {', '.join(_METHODS)}",
            hint=_ORIGINAL,
        )
    return make(settings)


def _settings(config: Mapping[str, Any], folder: Path) -> tuple[Any, str | None]:
    """What is said of the quantization, and the method that it means if it names none."""
    for key in CONFIG_KEYS:
        if settings := config.get(key):
            return settings, {"compression_config": "compressed-tensors"}.get(key)
    for name, method in _FILES.items():
        if (folder / name).is_file():
            return read_object(folder / name), method
    return None, None


def modules(quantized: Format, files: TensorFiles) -> list[str]:
    """The modules whose matrices are stored in this format: those that have its marks."""
    return sorted(
        {
            name.removesuffix(f".{mark}")
            for mark in quantized.marks
            for name in files.shapes
            if name.endswith(f".{mark}")
        }
    )


def decode(quantized: Format, module: str, files: TensorFiles) -> Tensor:
    """A module's matrix, float32 [out_features, in_features].

    Raises:
        UnsupportedError: it holds one number throughout, which no model learns: space for
            weights that were never written, or packed in a way that the config does not tell.
    """
    matrix = quantized.decode(module, files)
    lowest, highest = matrix.aminmax()
    if lowest == highest != 0:  # a pruned one may be all zero
        raise UnsupportedError(
            f"this checkpoint is quantized already ({quantized.name}), but its packed "
            f"{module}.weight holds nothing but {float(lowest):g}",
            hint=_ORIGINAL,
        )
    return matrix


def refuse_unexplained(files: TensorFiles) -> None:
    """Of a checkpoint that says nothing about quantization: that its tensors are none.

    Raises:
        UnsupportedError: some are parts of quantized matrices.
    """
    for name in files.shapes:
        if name.endswith(_SIGNS):
            raise UnsupportedError(
                f"this checkpoint is quantized already ({name}), and neither its config.json nor "
                "a quantize_config.json says how",
                hint=_ORIGINAL,
            )
