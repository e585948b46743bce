"""Checkpoints that came quantized by another program, decoded to floats a matrix at a time."""

from teal_cli.model.prequantized.detect import (
    CONFIG_KEYS,
    decode,
    format_of,
    modules,
    refuse_unexplained,
)
from teal_cli.model.prequantized.format import Format

__all__ = ["CONFIG_KEYS", "Format", "decode", "format_of", "modules", "refuse_unexplained"]
