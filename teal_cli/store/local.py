"""What a local path holds: a Hugging Face folder, a GGUF file, its parts, or something else."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from teal_cli.errors import TealError, UnsupportedError, UsageError

GGUF_MAGIC = b"GGUF"
# gguf-split's names; llama.cpp finds a model's other parts by them too.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
# Files cut into pieces that must be joined again, as some do that are above 50 GB.
_PIECE = re.compile(r".+\.gguf[.-](split|part)[\w-]*", re.IGNORECASE | re.DOTALL)
_HEAD_BYTES = 4096
_DO_NOT_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_MOST_NAMES = 5  # in a message
_FOLDER = "Name the model's folder."
_SAFETENSORS = "Take the model as safetensors, and name its folder."
_CONVERT = "llama.cpp reads it no more either; take the model as a .gguf file or as safetensors."
# First bytes of what is taken for a model by mistake: what it is, and what to do.
_OLD_GGML = {
    b"lmgg": ("in the ggml format of 2023", _CONVERT),
    b"fmgg": ("in the ggmf format of 2023", _CONVERT),
    b"tjgg": ("in the ggjt format of 2023", _CONVERT),
    b"algg": ("a LoRA adapter in the ggla format", "Name the model that it belongs to."),
}
_FOREIGN = {
    b"version https://git-lfs": (
        "a Git LFS pointer, not the file itself",
        "Run `git lfs pull` where it is, or download the file again.",
    ),
    b"PK\x03\x04": ("a zip archive, as PyTorch stores weights", _SAFETENSORS),
    b"\x80": ("a Python pickle, as PyTorch stores weights", _SAFETENSORS),
    b"\x89HDF": ("an HDF5 file, as Keras stores weights", _SAFETENSORS),
    b"\x1f\x8b": ("a gzip archive", "Unpack it first."),
    b"<!doctype html": ("a web page", "Download the file itself."),
    b"<html": ("a web page", "Download the file itself."),
}


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read bytes; a pipe, socket or device could keep a reader for ever.

    Raises:
        OSError: it cannot be opened.
        TealError: it is of such a kind.
    """
    if stat.S_ISREG(path.stat().st_mode):  # a socket cannot even be opened
        descriptor = os.open(path, os.O_RDONLY | _DO_NOT_WAIT)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    raise TealError(
        f"{path} is a folder, a pipe, a socket or a device, where a file should be",
        hint="Name a file; what comes out of a pipe can be written into one first.",
    )


def has_file(path: Path) -> bool:
    """Whether a file is there, which may be left out.

    Raises:
        OSError: it cannot be opened.
        TealError: something else is in its place.
    """
    if not os.path.lexists(path):
        return False
    if path.is_symlink() and not os.path.exists(path):
        raise TealError(
            f"{path} is a link that leads nowhere",
            hint="Put the file in its place; where it was downloaded, download it again.",
        )
    open_regular(path).close()
    return True


def read_regular(path: Path, most_bytes: int = 1 << 26) -> bytes:
    """A file's content, of a size that a description has; the errors of `open_regular`.

    Raises:
        TealError: it is larger.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise TealError(f"{path} is larger than {most_bytes >> 20} MB, which no such file is")
    return content


def model_at(path: Path) -> tuple[Literal["folder", "gguf"], Path]:
    """The model that an existing path names: its kind, and the folder or the (first) file.

    Raises:
        UsageError: it holds no model, or several.
        UnsupportedError: it is a model in a format that is not read.
    """
    if path.is_dir():
        found = _gguf_in(path)
        return ("folder", path.resolve()) if found is None else ("gguf", _resolved(found))
    if not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder", hint=_FOLDER)
    _check_gguf(path)
    return "gguf", _resolved(gguf_parts(path)[0])


def gguf_parts(path: Path) -> list[Path]:
    """The files of the model that a GGUF file belongs to, in their order, by its name alone."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    stem, _, count, suffix = named.groups()
    names = [f"{stem}-{number:05}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    return [path.with_name(name) for name in names] or [path]


def gguf_pattern(names: Iterable[str]) -> str | None:
    """A pattern for the files of one GGUF model among these names, the usual Q4_K_M if it is there.

    None if there is none.
    """
    found = sorted(name for name in names if name.lower().endswith(".gguf"))
    if not found:
        return None
    chosen = next((name for name in found if "q4_k_m" in name.lower()), found[0])
    return re.sub(r"-\d{5}-of-\d{5}\.gguf$", "-*.gguf", chosen)


def _gguf_in(folder: Path) -> Path | None:
    """The one GGUF model of a folder without safetensors; None if there is none."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() == ".gguf" and f.is_file())
    if not files or any(folder.glob("*.safetensors")):
        return None
    # A vision model's projector lies beside it, and is no model of its own.
    models = [file for file in files if "mmproj" not in file.name.lower()] or files
    firsts = list(dict.fromkeys(gguf_parts(file)[0] for file in models))
    if len(firsts) > 1:
        names = ", ".join(first.name for first in firsts[:_MOST_NAMES])
        more = f" and {len(firsts) - _MOST_NAMES} more" if len(firsts) > _MOST_NAMES else ""
        raise UsageError(f"{folder} holds several models: {names}{more}", hint="Name one of them.")
    return firsts[0]


def _resolved(path: Path) -> Path:
    """The path without links; a part keeps its name, by which the others are found."""
    return path.parent.resolve() / path.name if _PART.fullmatch(path.name) else path.resolve()


def _check_gguf(path: Path) -> None:
    """Raise unless a file is GGUF by its first bytes, or at least by its name."""
    if _PIECE.fullmatch(path.name):
        raise UsageError(
            f"{path} is a piece of a GGUF file",
            hint="Join the pieces in their order first: cat PIECE… > model.gguf",
        )
    with open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(GGUF_MAGIC):
        return
    if head[:4] in _OLD_GGML:
        what, hint = _OLD_GGML[head[:4]]
        raise UnsupportedError(f"{path} is {what}, not a GGUF file", hint=hint)
    if (known := _foreign(path, head)) is not None:
        what, hint = known
        raise UsageError(f"{path} is {what}, not a GGUF file", hint=hint)
    if path.suffix.lower() != ".gguf":
        raise UsageError(f"{path} is a file, but not a .gguf", hint=_FOLDER)


def _foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that is no GGUF, and what to do; None if its first bytes do not tell."""
    for magic, known in _FOREIGN.items():
        if head.lstrip().lower().startswith(magic.lower()):
            return known
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file", "Name the folder that it is in."
    if not head.lstrip().startswith(b"{"):
        return None
    if b"vnd.ollama" in head or b"vnd.docker.distribution" in head:
        return "an ollama manifest", f"Name the blob that it lists: {_ollama_blob(path)}."
    return "a JSON file", _FOLDER


def _ollama_blob(manifest: Path) -> str:
    """The file name of the weights among ollama's blobs."""
    try:
        layers = json.loads(read_regular(manifest))["layers"]
        digests = [
            layer["digest"] for layer in layers if layer["mediaType"].endswith("image.model")
        ]
        return f"blobs/{digests[0].replace(':', '-')}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "blobs/sha256-…"
