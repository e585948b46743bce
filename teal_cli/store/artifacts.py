"""Files that are whole or absent: atomic writes, locks, manifests, free space.

A writer makes its file or folder under a temporary name beside the final one, flushes it to the
disk and renames it. What a killed writer leaves is removed by the next writer of the same
artifact, under the artifact's lock.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from teal_cli.errors import MissingError, TealError
from teal_cli.progress import Reporter
from teal_cli.store.local import read_regular
from teal_cli.version import __version__

CHECKPOINT, MANIFEST = "checkpoint", "manifest.json"  # a converted model: its kind, and its file
CHAT = "chat"
SCHEMAS = {CHECKPOINT: 2, CHAT: 1}  # the format of each kind
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY, _LOCK = ".partial-", ".lock"
_SHORT_S = 1.0  # a wait that is not worth a word
_MOST_TRIES = 10  # to find the folder of a lock between its removals
_ELSEWHERE = "Or choose another place: TEAL_HOME for teal's files, HF_HOME for the Hub's cache."


def atomic_write(
    path: Path, content: bytes | Callable[[BinaryIO], None], *, private: bool = False
) -> None:
    """Write a file whole: `content`, or what it writes to the binary file it is given.

    Through a link, the file that it leads to. One that is there keeps its mode; a new `private`
    one is for the user alone, whatever the umask.
    """
    path = _followed(path)
    with _disk_full_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _beside(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(_mode(path, 0o600 if private else 0o666 & ~_umask()))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Raise the OSError that `atomic_write` would, but for a missing folder, which it makes."""
    path = _followed(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    descriptor, temporary = _beside(path)
    os.close(descriptor)
    temporary.unlink()


def _followed(path: Path) -> Path:
    """The path with all links followed.

    Raises:
        OSError: they lead in a circle.
    """
    followed = Path(os.path.realpath(path))
    if followed.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return followed


def _beside(path: Path) -> tuple[int, Path]:
    """A new temporary file, 0600, that can take `path`'s place: its descriptor and its name."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{_TEMPORARY}", dir=path.parent)
    return descriptor, Path(name)


def _mode(path: Path, default: int) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return default


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A temporary folder that takes `path`'s place when the block ends without an error.

    Hold `lock(path)` around it: what earlier, killed writers left is removed first.
    """
    with _disk_full_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_TEMPORARY}", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened:
                        os.fsync(opened.fileno())
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}{_TEMPORARY}", dir=path.parent))
                path.replace(old / path.name)
                temporary.replace(path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def spent(folder: Path) -> Iterator[None]:
    """Remove a folder that the block makes needless; it is back if the block fails.

    What a process that is killed meanwhile leaves of it goes with `remove_leftovers`.
    """
    temporary = folder.with_name(f".{folder.name}{_TEMPORARY}spent")
    with contextlib.suppress(FileNotFoundError):
        folder.replace(temporary)
    try:
        yield
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.replace(folder)
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left beside it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}{_TEMPORARY}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def leftover_of(name: str) -> str | None:
    """The artifact that a temporary file or folder of this name is for; None if it is none."""
    artifact, mark, _ = name.rpartition(_TEMPORARY)
    return artifact[1:] if mark and artifact.startswith(".") and artifact != "." else None


def is_lock(name: str) -> str | None:
    """The artifact that a file of this name locks; None if it is no lock."""
    return name[1 : -len(_LOCK)] or None if name.startswith(".") and name.endswith(_LOCK) else None


def discard(path: Path) -> None:
    """Remove a file, a folder or a link, under its lock; of a link, the link alone.

    It loses its name first: whenever this is broken off, what is left looks like what it is, and
    `discard` of the rest goes on.
    """
    if leftover_of(path.name) is None:
        temporary = path.with_name(f".{path.name}{_TEMPORARY}removed")
        if os.path.lexists(temporary):
            _delete(temporary)
        path.rename(temporary)
        path = temporary
    _delete(path)
    _sync_folder(path.parent)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock(path: Path, reporter: Reporter, *, wait: bool = True) -> Iterator[None]:
    """Hold the artifact's lock; say once if another process holds it, then wait for it.

    The operating system releases the lock of a process that dies.

    Raises:
        TealError: another process holds it, and this one is not to `wait`.
    """
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}{_LOCK}")
    held, timeout_s, tries = FileLock(file), _SHORT_S if wait else 0.0, 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=timeout_s)
            break
        except Timeout:
            if not wait:
                raise TealError(
                    f"{path} is in use: {_holder(file)} is making it",
                    hint="Run the same command again when that has ended.",
                ) from None
            reporter.note(
                f"{_holder(file)} is making {path}; waiting for it (Ctrl-C ends the waiting and "
                "leaves the other alone)"
            )
            timeout_s = -1
        except (FileNotFoundError, FileExistsError):  # the folder was removed meanwhile
            tries += 1
            if tries > _MOST_TRIES:  # or there is something else in its place
                raise
    try:
        yield
    finally:
        held.release()


def _holder(lock: Path) -> str:
    """Who holds a lock: its number, where the system tells."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, _, number, place = line.split()[:6]
            if kind == "FLOCK" and place.endswith(f":{inode}") and int(number) > 0:
                return f"process {number}"
    return "another process"


def write_manifest(
    path: Path, kind: str, payload: dict[str, Any], *, private: bool = False
) -> None:
    """Write the JSON that says what an artifact is and what it was made from."""
    manifest = {"schema": SCHEMAS[kind], "kind": kind, "teal": __version__, **payload}
    atomic_write(path, json.dumps(manifest, indent=2).encode(), private=private)


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        MissingError: there is none.
        TealError: it is damaged, of another kind, or of another version's format.
    """
    try:
        manifest = json.loads(read_regular(path).decode())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(
            f"there is no {kind} in {path.parent}", hint="`teal convert` makes it."
        ) from None
    except (ValueError, RecursionError) as error:
        raise TealError(
            f"{path} is damaged: {error}", hint="Make it again: `teal convert --force`."
        ) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise TealError(f"{path} is not the manifest of a {kind}")
    if manifest.get("schema") != SCHEMAS[kind]:
        raise TealError(
            f"{path} has format {manifest.get('schema')}, this version of teal reads "
            f"{SCHEMAS[kind]}",
            hint=f"Make it again: `teal convert {_arguments(manifest)}--force`.",
        )
    return manifest


def _arguments(manifest: dict[str, Any]) -> str:
    """What a checkpoint's manifest of any version says of how it was asked for."""
    model, quantization = manifest.get("model"), manifest.get("quantization")
    named = f"{model} " if isinstance(model, str) else ""
    return named + (f"--quantize {quantization} " if isinstance(quantization, str) else "")


@contextmanager
def _disk_full_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise TealError(
            f"the disk is full: {path} could not be written, {_free_bytes(path) / 1e6:,.1f} MB are "
            "free there",
            hint=f"Free some space, then run the same command again. {_ELSEWHERE}",
        ) from error


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Raise a TealError unless the disk under `path` has room for `needed_bytes`."""
    free_bytes = _free_bytes(path)
    if free_bytes < needed_bytes:
        raise TealError(
            f"the disk is too full: {path} needs {needed_bytes / 1e9:,.2f} GB, "
            f"{free_bytes / 1e9:,.2f} GB are free there",
            hint=f"Free some space, then run the same command again. {_ELSEWHERE}",
        )


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
