"""What every format of quantized matrices has to say, and the sums that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.config import DAMAGED
from teal_cli.model.tensor_files import TensorFiles

FLOATS = "F16 BF16 F32"


class Format(Protocol):
    """One way to store the matrix of a linear module or an embedding as several tensors."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Tensors of a module that show that its matrix is stored this way."""

    @property
    def parts(self) -> tuple[str, ...]:
        """All tensors that its matrix may be stored as."""

    def shape(self, module: str, files: TensorFiles) -> tuple[int, int]:
        """(out_features, in_features), from headers.

        Raises:
            TealError: a part is missing, or the parts do not fit together.
            UnsupportedError: this module is stored in a variant that teal does not decode.
        """

    def decode(self, module: str, files: TensorFiles) -> Tensor:
        """The matrix, float32 [out_features, in_features]."""


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits that lie one after another, the lowest bits first.

    Args:
        words: 32-bit integers [rows, W], where 32 values take `bits` words; the last may lack.
        bits: 2 to 8.

    Returns:
        uint8 [rows, 32 × ceil(W / bits)]; what goes beyond W words is zero.
    """
    words = words.view(torch.int32).long() & 0xFFFFFFFF
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    out = torch.empty(*words.shape[:2], 32, dtype=torch.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = words[..., word] >> shift
        if shift + bits > 32:
            value |= words[..., word + 1] << (32 - shift)
        out[..., i] = value & (1 << bits) - 1
    return out.flatten(1)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_of: Tensor | None = None
) -> Tensor:
    """(code − zero point) × scale, with one of each for a row's group of columns.

    Args:
        codes: [out, in].
        scales: [out, G] or [1, 1], float.
        zeros: of the scales' shape; None is zero.
        group_of: the group of each column, [in]; None is in / G columns after another.

    Returns:
        float32 [out, in].
    """
    out = codes.float()
    if group_of is None:
        grouped = out.view(len(out), scales.shape[1], -1)
        if zeros is not None:
            grouped -= zeros.unsqueeze(-1)
        grouped *= scales.unsqueeze(-1)
    else:
        if zeros is not None:
            out -= zeros[:, group_of]
        out *= scales.float()[:, group_of]
    return out


def column_groups(module: str, files: TensorFiles, groups: int) -> Tensor | None:
    """compressed-tensors' group of each input, [in]; None where they come one after another.

    Raises:
        TealError: it names groups that are not there.
    """
    name = f"{module}.weight_g_idx"
    if name not in files:
        return None
    group_of = files.read(name).long()
    if -1 in group_of:  # how it is set before anything is reordered
        return None
    check_groups(name, group_of, groups)
    return group_of


def grouped_as(module: str, files: TensorFiles, in_features: int) -> bool:
    """Whether compressed-tensors' groups, where there are any, are one for each input."""
    name = f"{module}.weight_g_idx"
    return name not in files or (
        files.shape(name) == (in_features,) and files.dtypes[name] in ("I32", "I64")
    )


def check_groups(name: str, group_of: Tensor, groups: int) -> None:
    """That the group of each input is one of `groups`.

    Raises:
        TealError: one is not.
    """
    if not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
        raise TealError(f"{name} names groups that are not there", hint=DAMAGED)


def stored_as(files: TensorFiles, module: str, **parts: str) -> bool:
    """Whether those parts of a module that are there have these dtypes (several: with blanks)."""
    names = {f"{module}.{part}": dtypes.split() for part, dtypes in parts.items()}
    return all(files.dtypes[name] in dtypes for name, dtypes in names.items() if name in files)


def misfit(module: str, files: TensorFiles, *parts: str) -> TealError:
    """The error about parts whose shapes contradict each other."""
    names = {part: f"{module}.{part}" for part in parts}
    found = ", ".join(
        f"{part} {files.dtypes[name]} {list(files.shapes[name])}"
        for part, name in names.items()
        if name in files
    )
    return TealError(f"the parts of {module}.weight do not fit together: {found}", hint=DAMAGED)


def setting(
    settings: Mapping[str, Any], name: str, default: int | None, *known: int, format: str
) -> int:
    """A whole number of a quantization's settings, one of `known` where these are given.

    Raises:
        UnsupportedError: it is something else.
    """
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or (known and value not in known):
        choice = f"; teal decodes {', '.join(map(str, known))}" if known else ""
        raise UnsupportedError(
            f"this checkpoint is quantized already ({format}) with {name} {value!r}{choice}"
        )
    return value
