"""A model's files out of the Hub, into Hugging Face's own cache, by Hugging Face's own client.

The client forgets a half-written file when its process ends, so the large files are fetched here
first, through its `http_get`, into partial files that the next run continues with a Range
request; the client then finds them in its cache and links them. One file comes after the other,
in the main thread, so that Ctrl-C ends a download at once.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli.errors import AccessError, MissingError, TealError, UnsupportedError
from teal_cli.progress import Reporter, Task
from teal_cli.store import artifacts, local

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# What the decoder and the tokenizer read; never pickles, other frameworks or other precisions.
NEEDED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "quantize_config.json",  # GPTQ and AWQ of 2023
    "quant_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
    "vocab.json",
    "merges.txt",
]
_SHA256 = re.compile("[0-9a-f]{64}")
_TIMEOUT_S = 6  # for the listing; the client itself would wait without end
_AGAIN = "Run the same command again: it continues where it stopped."


class Unreachable(Exception):
    """The Hub does not answer."""


def cached(name: str, revision: str | None) -> Path | None:
    """The complete snapshot in the cache; None if there is none. Asks no server."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=NEEDED, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    # Of older clients' snapshots, only these two say something about completeness.
    path = Path(folder)
    whole = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return path if whole else None


def download(name: str, revision: str | None, token: str | None, reporter: Reporter) -> Path:
    """The snapshot of the Hub's present commit, complete; what is missing is fetched.

    Raises:
        Unreachable: the Hub does not answer, or is out of order.
        MissingError: there is no such model or revision, or it holds no safetensors.
        UnsupportedError: it is an adapter.
        AccessError: the model is gated, or the token is refused.
        TealError: the disk is too small, or the transfer broke off.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    here = cached(name, revision)
    try:
        info = HfApi(token=token).model_info(
            name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except Exception as error:
        raise _explained(error, name, revision, token, listing=True) from error
    files = [
        file
        for file in info.siblings or []
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in NEEDED)
    ]
    names = {file.rfilename for file in files}
    weights = any(name.endswith(".safetensors") for name in names)
    if not weights and any(f.rfilename == "adapter_config.json" for f in info.siblings or []):
        raise UnsupportedError(
            f"{name} holds an adapter (LoRA), not a model",
            hint="Merge it with its model first, by peft's merge_and_unload(), "
            "and name the folder of the result.",
        )
    if "config.json" not in names or not weights:
        pattern = local.gguf_pattern(file.rfilename for file in info.siblings or [])
        raise MissingError(
            f"{name} holds no model in the safetensors format",
            hint="It has GGUF files: fetch the one you want and name it as the model, for example "
            f"hf download {name} --include '{pattern}' --local-dir ."
            if pattern
            else "Choose a repository with config.json and model.safetensors in it.",
        )
    if here is not None and here.name == info.sha and all((here / n).is_file() for n in names):
        return here
    assert info.sha is not None
    try:
        missing = _Missing(Path(constants.HF_HUB_CACHE), name, info.sha, files)
        artifacts.check_free_space(missing.cache, missing.nbytes)
        kept = f" (the other {missing.kept_bytes / 1e6:,.1f} MB are here)"
        reporter.note(
            f"downloading {name}, {missing.nbytes / 1e6:,.1f} MB"
            f"{kept if missing.kept_bytes else ''} → {missing.cache}"
        )
        with reporter.task("Downloading", missing.nbytes, "B") as task:
            _announce_waits(reporter)
            for file in missing.large:
                missing.fetch(file, token, task, reporter)
            missing.remove_leftovers()
            folder = snapshot_download(
                name,
                revision=revision,
                token=token,
                allow_patterns=NEEDED,
                tqdm_class=_bar(task),
            )
    except TealError:
        raise
    except Exception as error:
        raise _explained(error, name, revision, token, listing=False) from error
    return Path(folder)


class _Missing:
    """The files of a commit that the cache lacks.

    `nbytes` are to come; `kept_bytes` were left by an interrupted run. `large` are the files that
    `fetch` serves, before the client looks after the rest.
    """

    def __init__(self, cache: Path, name: str, commit: str, files: list[RepoSibling]) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name

        self.cache, self._name, self._commit = cache, name, commit
        folder = repo_folder_name(repo_id=name, repo_type="model")
        self._blobs, self._locks = cache / folder / "blobs", cache / ".locks" / folder
        snapshot = cache / folder / "snapshots" / commit
        absent = [file for file in files if not (snapshot / file.rfilename).exists()]
        absent = [file for file in absent if not (self._blobs / _digest(file)).exists()]
        self._absent = absent
        # Without symlinks the client would copy the blob; there, it fetches the files itself.
        # So it does what plain HTTP does not serve.
        linked = are_symlinks_supported(cache)
        self.large = [
            file
            for file in absent
            if linked
            and file.lfs is not None
            and _SHA256.fullmatch(file.lfs.sha256)  # it becomes a file's name
            and (file.size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE
        ]
        self.kept_bytes = sum(_size(self._partial(file)) for file in self.large)
        self.nbytes = sum(file.size or 0 for file in absent) - self.kept_bytes

    def _partial(self, file: RepoSibling) -> Path:
        return self._blobs / f"{_digest(file)}.teal.incomplete"

    def remove_leftovers(self) -> None:
        """Remove what the client, when it was killed, left of missing files: it never looks again.

        It holds a file's lock while it writes; a file that another process fetches is let be.
        """
        from filelock import FileLock, Timeout

        for file in self._absent:
            for leftover in self._blobs.glob(f"{_digest(file)}.????????.incomplete"):
                held = FileLock(self._locks / f"{_digest(file)}.lock", timeout=0)
                with contextlib.suppress(Timeout), held:
                    leftover.unlink(missing_ok=True)

    def fetch(self, file: RepoSibling, token: str | None, task: Task, reporter: Reporter) -> None:
        """Fetch one large file, or the rest of it, and put it among the cache's blobs."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        blob, partial = self._blobs / _digest(file), self._partial(file)
        url = hf_hub_url(self._name, file.rfilename, revision=self._commit)
        with artifacts.lock(self._locks / _digest(file), reporter):
            if blob.exists():  # another process has fetched it while this one waited
                return
            partial.parent.mkdir(parents=True, exist_ok=True)
            if _size(partial) > (file.size or 0):
                partial.unlink()
            with partial.open("ab") as opened:
                while True:
                    start_bytes = opened.tell()
                    try:
                        http_get(
                            url,
                            opened,
                            resume_size=start_bytes,
                            headers=build_hf_headers(token=token),
                            expected_size=file.size,
                            tqdm_class=_bar(task),
                        )
                        break
                    except Exception as error:
                        # A line that breaks now and then gets there, as long as bytes come.
                        if not _is_transport(error) or opened.tell() == start_bytes:
                            raise
            with reporter.task(f"Checking {file.rfilename}", _size(partial), "B") as check:
                damaged = _sha256(partial, check) != _digest(file)
            if damaged:
                partial.unlink()
                raise TealError(f"{file.rfilename} of {self._name} came in damaged", hint=_AGAIN)
            partial.replace(blob)


def _digest(file: RepoSibling) -> str:
    """The file's name among the cache's blobs: its SHA-256, or git's name of a small file."""
    return file.lfs.sha256 if file.lfs is not None else str(file.blob_id)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path, task: Task) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            task.advance(len(block))
    return digest.hexdigest()


def _bar(task: Task) -> type:
    """A stand-in for the client's progress bars that hands the bytes that arrive on to `task`."""
    from huggingface_hub.utils import tqdm

    counted = ("huggingface_hub.http_get", "huggingface_hub.snapshot_download")

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            self._counts = name in counted
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                task.advance(int(n))
            return None

    return Bar


def _announce_waits(reporter: Reporter) -> None:
    """Have the client say when it waits because the Hub asks it to, which may last minutes."""
    from huggingface_hub.utils import get_session

    def look(response: Any) -> None:
        wait = _wait(response.headers)
        if response.status_code == 429 and wait:
            reporter.note(f"the Hub asks to wait {wait}; the download goes on then")

    session = get_session()
    session.event_hooks = {
        **session.event_hooks,
        "response": [*session.event_hooks.get("response", ()), look],
    }


def _wait(headers: Any) -> str:
    """How long the Hub wants no more requests, by either of its headers; empty if it says not."""
    found = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(
        r"(?<=;t=)\d+", headers.get("RateLimit", "")
    )
    return f"{found[0]} s" if found else ""


def _explained(
    error: Exception, name: str, revision: str | None, token: str | None, *, listing: bool
) -> Exception:
    """What the user should read instead of the client's error; others pass unchanged."""
    from huggingface_hub import errors

    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, errors.HfHubHTTPError):
            return _refusal(cause, name, revision, token, listing=listing)
    if any(isinstance(e, OSError) and e.errno in artifacts.DISK_FULL for e in causes):
        return TealError(
            f"the disk filled up while {name} came in", hint=f"Free some space. {_AGAIN}"
        )
    if any(isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EROFS) for e in causes):
        return TealError(
            f"Hugging Face's cache cannot be written ({error})",
            hint="Choose another place for it with HF_HOME, or fix its rights.",
        )
    if any(_is_transport(e) or isinstance(e, errors.LocalEntryNotFoundError) for e in causes):
        if listing:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
            return Unreachable(f"the Hub cannot be reached ({reason})")
        return TealError(f"the connection broke off while {name} came in", hint=_AGAIN)
    if any("consistency check" in str(e).lower() for e in causes):
        return TealError(f"a file of {name} came in damaged", hint=_AGAIN)
    return error


def _refusal(
    error: Any, name: str, revision: str | None, token: str | None, *, listing: bool
) -> Exception:
    """The sentence for an HTTP status that the Hub answered with."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/{name}"
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return AccessError(
            f"access to {name} is restricted",
            hint=f"Accept its terms at {url}, then log in with `hf auth login` or pass --token.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingError(f"{name} has no revision {revision!r}", hint=f"See {url}/commits.")
    if status == 401 and (token or "Invalid" in str(error)):
        return AccessError("the Hub refused the access token", hint="Log in: `hf auth login`.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingError(
            f"there is no model {name!r} on the Hub, or it is private",
            hint="Check the spelling; for a private model log in with `hf auth login` or pass "
            "--token.",
        )
    if status == 429:
        reason = f"asks to wait {_wait(error.response.headers)}".rstrip()
    else:
        reason = "is out of order" if listing and status >= 500 else "failed"
    if listing and (status == 429 or status >= 500):
        return Unreachable(f"the Hub {reason} ({status})")
    return TealError(f"the Hub {reason} ({status}) while {name} came in", hint=_AGAIN)


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
