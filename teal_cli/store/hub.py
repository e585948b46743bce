"""Brings a model's files here: from the Hub into Hugging Face's own cache, or from a local path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli.errors import AccessError, MissingError, TealError
from teal_cli.progress import Reporter, Task
from teal_cli.store import artifacts, demo
from teal_cli.store.models import DEMO, ModelRef

# What the decoder and the tokenizer read; never pickles, other frameworks or other precisions.
_NEEDED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
]
_AGAIN = "Run the same command again: it continues where it stopped."


@dataclass(frozen=True, slots=True)
class Source:
    """A model's files as they came: a folder in Hugging Face's format, or a GGUF file.

    `fingerprint` names this exact content, `revision` the Hub's commit.
    """

    ref: ModelRef
    folder: Path | None
    gguf: Path | None
    fingerprint: str
    revision: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are read."""
        if self.gguf is not None:
            return self.gguf.stat().st_size
        assert self.folder is not None
        return sum(file.stat().st_size for file in _relevant(self.folder))


class _Unreachable(Exception):
    """The Hub does not answer, or must not be asked."""


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
        MissingError: there is no such model, or it is not here and the Hub cannot be reached.
        AccessError: the model is gated, or the token is refused.
        TealError: the disk is too small, or the transfer broke off.
    """
    if ref.kind == "gguf":
        assert ref.path is not None
        return Source(ref, None, ref.path, _stat_fingerprint([ref.path]))
    if ref.kind == "folder":
        assert ref.path is not None
        return Source(ref, ref.path, None, _stat_fingerprint(_relevant(ref.path)))
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        folder = _snapshot(ref, token, offline, reporter)
    except _Unreachable as unreachable:
        cached = _cached_snapshot(ref)
        if cached is not None:
            if not offline:
                reporter.note(f"{unreachable}; using the copy of {ref.name} that is here")
            folder = cached
        elif ref.name == DEMO and ref.revision is None:
            return demo_source(demo.demo_gguf(reporter, offline=offline), ref)
        else:
            raise MissingError(
                f"{ref.name} is not on this machine, and {unreachable}",
                hint="Download it where there is a network: "
                f"`teal download {ref.name}`. Or name a local folder.",
            ) from None
    return Source(ref, folder, None, f"hub:{ref.name}@{folder.name}", folder.name)


def demo_source(gguf: Path, ref: ModelRef | None = None) -> Source:
    """The demo model's GGUF file, whose content is known by its SHA-256."""
    return Source(ref or ModelRef("hub", DEMO), None, gguf, f"sha256:{demo.GGUF_SHA256}")


def _snapshot(ref: ModelRef, token: str | None, offline: bool, reporter: Reporter) -> Path:
    """The model's snapshot in Hugging Face's cache, complete and up to date."""
    if offline:
        raise _Unreachable("the Hub must not be asked (offline)")
    from huggingface_hub import constants, snapshot_download

    wanted: dict[str, Any] = {
        "revision": ref.revision,
        "token": token,
        "allow_patterns": _NEEDED,
    }
    try:
        files = snapshot_download(ref.name, dry_run=True, **wanted)
        names = {file.filename for file in files}
        if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
            raise MissingError(
                f"{ref.name} holds no model in the safetensors format",
                hint="Choose a repository with config.json and model.safetensors in it.",
            )
        missing = [file for file in files if file.will_download]
        if not missing:
            return Path(snapshot_download(ref.name, tqdm_class=_bar(None), **wanted))
        needed_bytes = sum(file.file_size or 0 for file in missing)
        cache = Path(constants.HF_HUB_CACHE)
        artifacts.check_free_space(cache, needed_bytes)
        reporter.note(f"downloading {ref.name}, {needed_bytes / 1e9:.2f} GB → {cache}")
        with reporter.task("Downloading", needed_bytes, "B") as task:
            return Path(snapshot_download(ref.name, tqdm_class=_bar(task), **wanted))
    except TealError:
        raise
    except Exception as error:
        raise _explained(error, ref, token) from error


def _explained(error: Exception, ref: ModelRef, token: str | None) -> Exception:
    """What the user should read instead of the client's error; others pass unchanged."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/{ref.name}"
    causes = _causes(error)
    refused = [e for e in causes if isinstance(e, errors.HfHubHTTPError)]
    for http in refused:
        status = http.response.status_code if http.response is not None else 0
        if isinstance(http, errors.GatedRepoError) or status == 403:
            return AccessError(
                f"access to {ref.name} is restricted",
                hint=f"Accept its terms at {url}, then `hf auth login` or --token.",
            )
        if isinstance(http, errors.RevisionNotFoundError):
            return MissingError(f"{ref.name} has no revision {ref.revision!r}", hint=f"See {url}.")
        if status == 401 and (token or "Invalid" in str(http)):
            return AccessError(
                "the Hub refused the access token", hint="Log in again: `hf auth login`."
            )
        if isinstance(http, errors.RepositoryNotFoundError):
            return MissingError(
                f"there is no model {ref.name!r} on the Hub, or it is private",
                hint="Check the spelling; for a private model use `hf auth login` or --token.",
            )
        if status == 429:
            return TealError("the Hub asks to slow down (429)", hint="Wait a minute. " + _AGAIN)
        if status >= 500:
            return _Unreachable(f"the Hub is out of order ({status})")
    if any(isinstance(e, OSError) and e.errno in artifacts.DISK_FULL for e in causes):
        return TealError(f"the disk filled up while {ref.name} came in", hint=_AGAIN)
    if any(_is_transport(e) or isinstance(e, errors.LocalEntryNotFoundError) for e in causes):
        return _Unreachable("the Hub cannot be reached")
    if any("consistency check" in str(e).lower() for e in causes):
        return TealError(f"a file of {ref.name} came in damaged", hint=_AGAIN)
    return error


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


def _is_transport(error: BaseException) -> bool:
    """A failed connection; by name, as the client's HTTP library has changed with its versions."""
    named = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return named or isinstance(error, (ConnectionError, TimeoutError))


def _cached_snapshot(ref: ModelRef) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            ref.name, revision=ref.revision, allow_patterns=_NEEDED, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _bar(task: Task | None) -> type:
    """A stand-in for the client's progress bars that hands the bytes written on to `task`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            self._counts = task is not None and name == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and task is not None and n:
                task.advance(int(n))
            return None

    return Bar


def _relevant(folder: Path) -> list[Path]:
    return sorted({file for pattern in _NEEDED for file in folder.glob(pattern) if file.is_file()})


def _stat_fingerprint(files: Iterable[Path]) -> str:
    """Names the files' content without reading it: names, sizes, times of change."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"files:{digest.hexdigest()}"
