"""A model's files out of the Hub, into Hugging Face's own cache, by Hugging Face's own client.

The client forgets a half-written file when its process ends, so the large files are fetched here
first, through its `http_get`, into partial files that the next run continues with a Range
request; the client then finds them in its cache and links them. One file comes after the other,
in the main thread, so that Ctrl-C ends a download at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.progress import Reporter, Task
from teal_cli.store import artifacts, local
from teal_cli.store.access import access_token
from teal_cli.store.listing import NEEDED, File, NonsenseError, read_listing
from teal_cli.store.refusals import AGAIN, TransferError, explained, is_transport, wait

_LONGEST_WAIT_S = 600
_MOST_PAGES = 200  # of a list of files; the Hub has a thousand on each
_SPARE_BYTES = 1 << 20
_FILE_NAME = re.compile(r"(?!.*\.\.)[^/\\\x00-\x1f]{0,200}")


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


def download(
    name: str, revision: str | None, token: str | None, here: Path | None, reporter: Reporter
) -> Path:
    """The snapshot of the Hub's present commit, complete; what is missing is fetched.

    `here` is the snapshot that `cached` found.

    Raises:
        Unreachable: the Hub does not answer, is out of order, or is none.
        MissingError: there is no such model or revision, or it holds no safetensors.
        UnsupportedError: it is an adapter.
        AccessError: the model is gated, or the token is refused.
        TransferError: the transfer broke off, or brought something else.
        TealError: the disk is too small.
    """
    from huggingface_hub import constants, snapshot_download

    sent = access_token(token)
    try:
        listing = read_listing(name, revision, sent)
    except Exception as error:
        raise explained(error, name, revision, sent, listing=True) from error
    names = {file.name for file in listing.files}
    weights = any(name.endswith(".safetensors") for name in names)
    if not weights and "adapter_config.json" in listing.others:
        raise UnsupportedError(
            f"{name} holds an adapter (LoRA), not a model",
            hint="Merge it with its model first, by peft's merge_and_unload(), "
            "and name the folder of the result.",
        )
    if "config.json" not in names or not weights:
        pattern = local.gguf_pattern(listing.others)
        raise MissingError(
            f"{name} holds no model in the safetensors format",
            hint="It has GGUF files: fetch the one you want and name it as the model, for example "
            f"hf download {name} --include '{pattern}' --local-dir ."
            if pattern
            else "Choose a repository with config.json and model.safetensors in it.",
        )
    whole = here is not None and all((here / file.name).is_file() for file in listing.files)
    if here is not None and here.name == listing.commit and whole:
        return here
    try:
        missing = _Missing(Path(constants.HF_HUB_CACHE), name, listing.commit, listing.files)
    except OSError as error:
        raise explained(error, name, revision, sent, listing=False) from error
    try:
        artifacts.check_free_space(missing.cache, missing.nbytes)
        kept = f" (the other {missing.kept_bytes / 1e6:,.1f} MB are here)"
        reporter.note(
            f"downloading {name}, {missing.nbytes / 1e6:,.1f} MB"
            f"{kept if missing.kept_bytes else ''} → {missing.cache}"
        )
        with reporter.task("Downloading", missing.nbytes, "B") as task:
            _watch_answers(reporter)
            for file in missing.large:
                missing.fetch(file, sent, task, reporter)
            missing.remove_leftovers()
            folder = snapshot_download(
                name,
                revision=revision,
                token=sent,
                allow_patterns=NEEDED,
                tqdm_class=_bar(task, missing.small_bytes),
            )
        missing.check(Path(folder))
    except TransferError:
        missing.forget_list()
        raise
    except TealError:
        raise
    except Exception as error:
        missing.forget_list()
        raise explained(error, name, revision, sent, listing=False) from error
    return Path(folder)


class _Missing:
    """The files of a commit that the cache lacks.

    `nbytes` are to come; `kept_bytes` were left by an interrupted run. `large` are the files that
    `fetch` serves, before the client looks after the rest.
    """

    def __init__(self, cache: Path, name: str, commit: str, files: Sequence[File]) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name

        self.cache, self._name, self._commit = cache, name, commit
        self._folder = cache / repo_folder_name(repo_id=name, repo_type="model")
        self._blobs, self._locks = self._folder / "blobs", cache / ".locks" / self._folder.name
        snapshot = self._folder / "snapshots" / commit
        absent = [file for file in files if not (snapshot / file.name).exists()]
        absent = [file for file in absent if not (self._blobs / file.digest).exists()]
        self._absent = absent
        # Without symlinks the client would copy the blob; there, it fetches the files itself.
        # So it does what plain HTTP does not serve.
        linked = are_symlinks_supported(cache)
        self.large = [
            file
            for file in absent
            if linked
            and file.sha256 is not None
            and (file.nbytes or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE
        ]
        self.kept_bytes = sum(_size(self._partial(file)) for file in self.large)
        self.nbytes = sum(file.nbytes or 0 for file in absent) - self.kept_bytes

    @property
    def small_bytes(self) -> int | None:
        """The bytes of all but the large files; None where the Hub does not say."""
        sizes = [file.nbytes for file in self._absent if file not in self.large]
        return None if None in sizes else sum(filter(None, sizes))

    def check(self, folder: Path) -> None:
        """Make sure that what came by the client is what is listed.

        A large file's SHA-256 is looked at before it becomes a blob.

        Raises:
            TransferError: it is not; what is wrong is removed, and comes anew next time.
        """
        for file in self._absent:
            path = folder / file.name
            if not path.is_file():
                raise TransferError(f"{file.name} of {self._name} did not come in", hint=AGAIN)
            wrong = file.nbytes not in (None, path.stat().st_size)
            if not wrong and file.git_sha1 is not None:
                content = path.read_bytes()
                header = f"blob {len(content)}\0".encode()
                digest = hashlib.sha1(header + content, usedforsecurity=False)
                wrong = digest.hexdigest() != file.git_sha1
            if wrong:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise TransferError(f"{file.name} of {self._name} came in damaged", hint=AGAIN)

    def forget_list(self) -> None:
        """Remove the client's own list of the commit's files; it would never ask for another."""
        with contextlib.suppress(OSError):
            (self._folder / "trees" / f"{self._commit}.json").unlink()

    def _partial(self, file: File) -> Path:
        return self._blobs / f"{file.digest}.teal.incomplete"

    def remove_leftovers(self) -> None:
        """Remove what the client, when it was killed, left of missing files: it never looks again.

        It holds a file's lock while it writes; a file that another process fetches is let be.
        """
        from filelock import FileLock, Timeout

        for file in self._absent:
            for leftover in self._blobs.glob(f"{file.digest}.????????.incomplete"):
                held = FileLock(self._locks / f"{file.digest}.lock", timeout=0)
                with contextlib.suppress(Timeout), held:
                    leftover.unlink(missing_ok=True)

    def fetch(
        self, file: File, token: str | Literal[False], task: Task, reporter: Reporter
    ) -> None:
        """Fetch one large file, or the rest of it, and put it among the cache's blobs."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        blob, partial = self._blobs / file.digest, self._partial(file)
        url = hf_hub_url(self._name, file.name, revision=self._commit)
        with artifacts.lock(self._locks / file.digest, reporter):
            if blob.exists():  # another process has fetched it while this one waited
                return
            partial.parent.mkdir(parents=True, exist_ok=True)
            if _size(partial) > (file.nbytes or 0):
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
                            expected_size=file.nbytes,
                            tqdm_class=_bar(task, _rest(file, start_bytes)),
                        )
                        break
                    except Exception as error:
                        # A line that breaks now and then gets there, as long as bytes come.
                        if not is_transport(error) or opened.tell() == start_bytes:
                            raise
            with reporter.task(f"Checking {file.name}", _size(partial), "B") as check:
                damaged = _sha256(partial, check) != file.digest
            if damaged:
                partial.unlink()
                raise TransferError(f"{file.name} of {self._name} came in damaged", hint=AGAIN)
            partial.replace(blob)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path, task: Task) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            task.advance(len(block))
    return digest.hexdigest()


def _rest(file: File, start_bytes: int) -> int | None:
    return None if file.nbytes is None else file.nbytes - start_bytes


def _bar(task: Task, most_bytes: int | None) -> type:
    """A stand-in for the client's progress bars that hands the bytes that arrive on to `task`.

    Beyond `most_bytes` it breaks off what would fill the disk, as a few bytes can unpack to many.
    """
    from huggingface_hub.utils import tqdm

    counted = ("huggingface_hub.http_get", "huggingface_hub.snapshot_download")

    class Bar(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            self._counts = name in counted
            self._arrived_bytes = 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                self._arrived_bytes += int(n)
                if most_bytes is not None and self._arrived_bytes > most_bytes + _SPARE_BYTES:
                    raise NonsenseError("a file is longer than it should be")
                task.advance(int(n))
            return None

    return Bar


def _watch_answers(reporter: Reporter) -> None:
    """Have the client say when it waits because the Hub asks it to, which may last minutes.

    And have it give up where that would be for hours, where a list goes on without end, and where
    a header that names a file of its cache names one elsewhere.
    """
    from huggingface_hub.utils import get_session

    pages = 0

    def look(response: Any) -> None:
        nonlocal pages
        waits_s = wait(response.headers)
        if response.status_code == 429 and waits_s is not None:
            if waits_s > _LONGEST_WAIT_S:
                raise TransferError(f"the Hub asks to wait {waits_s} s", hint=f"Then: {AGAIN}")
            reporter.note(f"the Hub asks to wait {waits_s} s; the download goes on then")
        for header in ("ETag", "X-Linked-Etag", "X-Repo-Commit"):
            named = response.headers.get(header, "").removeprefix("W/")
            if response.request.method == "HEAD" and not _FILE_NAME.fullmatch(named):
                raise NonsenseError(f"its header {header} is no name")
        pages += "/tree/" in response.url.path
        if pages > _MOST_PAGES:
            raise NonsenseError("its list of files does not end")

    session = get_session()
    session.event_hooks = {
        **session.event_hooks,
        "response": [*session.event_hooks.get("response", ()), look],
    }
