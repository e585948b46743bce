"""Brings a model's files here: from the Hub into Hugging Face's own cache, or from a local path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from teal_cli.errors import AccessError, MissingError, TealError
from teal_cli.progress import Reporter, Silent
from teal_cli.store import demo, local, paths, snapshot
from teal_cli.store.listing import NEEDED
from teal_cli.store.models import DEMO, ModelRef
from teal_cli.store.refusals import TransferError, Unreachable


@dataclass(frozen=True, slots=True)
class Source:
    """A model's files as they came: a folder in Hugging Face's format, or a GGUF file.

    Of a GGUF model in parts, `gguf` is the first; the others lie beside it. `fingerprint` names
    this exact content, `revision` the Hub's commit.
    """

    ref: ModelRef
    folder: Path | None
    gguf: Path | None
    fingerprint: str
    revision: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are read."""
        return sum(file.stat().st_size for file in self._files)

    @property
    def stamp(self) -> str:
        """Changes with any of the files, as far as names, sizes and times show it."""
        return _stat_fingerprint(self._files)

    @property
    def _files(self) -> list[Path]:
        if self.gguf is not None:
            return local.gguf_parts(self.gguf)
        assert self.folder is not None
        return _relevant(self.folder)


def fetch(
    ref: ModelRef, *, token: str | None = None, offline: bool = False, reporter: Reporter
) -> Source:
    """Bring a model's files here, unless they are.

    Args:
        ref: the model.
        token: an access token; None takes HF_TOKEN or the one that `hf auth login` stored.
        offline: ask no server.
        reporter: told what is fetched, how big it is, and where it lands.

    Raises:
        UsageError: a local model's path is no text.
        MissingError: there is no such model, or it is not here and the Hub cannot be reached.
        AccessError: the model is gated, or the token is refused.
        TealError: the disk is too small, or the transfer broke off.
    """
    if ref.path is not None:
        paths.check_name(ref.path, "the model")
    if ref.kind == "gguf":
        assert ref.path is not None
        parts = _whole(ref.path)
        if demo.is_demo(ref.path):
            return demo_source(ref.path, ref)
        return Source(ref, None, ref.path, _stat_fingerprint(parts))
    if ref.kind == "folder":
        assert ref.path is not None
        return Source(ref, ref.path, None, _stat_fingerprint(_relevant(ref.path)))
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    folder = snapshot.cached(ref.name, ref.revision)
    refusal: TealError | None = None
    if not offline:
        try:
            found = snapshot.download(ref.name, ref.revision, token, folder, reporter)
            return _hub_source(ref, found)
        except (Unreachable, TransferError, MissingError, AccessError) as error:
            refusal = error
    if folder is not None:
        if refusal is not None:
            reporter.note(f"{refusal}; using the copy of {ref.name} that is here")
        return _hub_source(ref, folder)
    if refusal is not None and not isinstance(refusal, Unreachable):
        raise refusal
    if ref.name == DEMO and ref.revision is None:
        return demo_source(demo.demo_gguf(reporter, offline=offline), ref)
    raise MissingError(
        f"{ref.name} is not on this machine, and {refusal or 'no server may be asked (offline)'}",
        hint=(refusal and refusal.hint)
        or f"Run `teal download {ref.name}` where there is a network, or name a local folder.",
    )


def is_here(ref: ModelRef) -> bool:
    """Whether a model's files, of some revision, are on this machine."""
    if ref.path is not None or snapshot.cached(ref.name, ref.revision) is not None:
        return True
    return ref.name == DEMO and ref.revision is None and demo.is_here()


def gguf_of(ref: ModelRef) -> Path | None:
    """The GGUF file that the model comes from, if it is one and still here; asks no server."""
    try:
        return fetch(ref, offline=True, reporter=Silent()).gguf
    except TealError:
        return None


def _hub_source(ref: ModelRef, folder: Path) -> Source:
    return Source(ref, folder, None, f"hub:{ref.name}@{folder.name}", folder.name)


def demo_source(gguf: Path, ref: ModelRef | None = None) -> Source:
    """The demo model's GGUF file, whose content is known by its SHA-256."""
    return Source(ref or ModelRef("hub", DEMO), None, gguf, f"sha256:{demo.GGUF_SHA256}")


def _whole(gguf: Path) -> list[Path]:
    """The files of a GGUF model, all of which are there."""
    parts = local.gguf_parts(gguf)
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MissingError(
            f"{missing[0]} is missing from {gguf.parent}{more}",
            hint=f"All {len(parts)} parts of the model belong into one folder.",
        )
    return parts


def _relevant(folder: Path) -> list[Path]:
    # A local index may give its shards any name.
    patterns = [*NEEDED, "*.safetensors"]
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _stat_fingerprint(files: Iterable[Path]) -> str:
    """Names the files' content without reading it: names, sizes, times of change."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"files:{digest.hexdigest()}"
