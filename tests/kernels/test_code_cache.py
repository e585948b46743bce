"""Compiled code on disk: damaged, foreign or full places are noticed, and never in the way."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from teal_kernels.cpu import code_cache
from teal_kernels.cpu.code_cache import CodeCache


def double(x: int) -> int:
    return 2 * x


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    return tmp_path


def run() -> tuple[int, str | None]:
    """How often the code was found on disk, in a process that begins; and what is said of it."""
    function: Any = numba.njit(double)
    function._cache = CodeCache(double)
    assert function(21) == 42
    return sum(function._cache_hits.values()), function._cache.problem


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "a byte within": lambda path: flip(path, len(path.read_bytes()) // 2),
    "last byte": lambda path: flip(path, -1),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "numba's own": lambda path: path.write_bytes(pickle.dumps("0.1") + pickle.dumps((1, {}))),
    "gone": lambda path: path.unlink(),
}
if hasattr(os, "mkfifo"):
    DAMAGES["pipe"] = pipe


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_damage_is_removed_and_the_code_compiled_anew(
    suffix: str, damage: Callable[[Path], object], place: Path
) -> None:
    assert [run(), run()] == [(0, None), (1, None)]
    (path,) = place.rglob(f"*.{suffix}")
    damage(path)
    assert [run(), run()] == [(0, None), (1, None)]


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_another_users_file_is_not_run(
    suffix: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    if os.name != "posix" or os.geteuid() != 0:
        monkeypatch.setattr("os.geteuid", lambda: 12345)
    else:
        (path,) = place.rglob(f"*.{suffix}")
        os.chown(path, 12345, -1)
    assert run() == (0, None)


def test_what_another_version_of_numba_made_is_made_anew(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("numba.__version__", "0.1")
        run()
    assert [run(), run()] == [(0, None), (1, None)]


def test_a_place_that_cannot_be_mended_is_named(place: Path) -> None:
    run()
    (path,) = place.rglob("*.nbi")
    path.unlink()
    (path / "a folder").mkdir(parents=True)
    hits, problem = run()
    assert hits == 0
    assert problem is not None
    assert f"cannot be kept in {path.parent} (" in problem


def test_a_full_disk_is_named_and_does_not_stop_compilation(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_cache._CheckedFiles, "_write", full)
    hits, problem = run()
    assert hits == 0
    assert problem is not None
    assert f"cannot be kept in {place}" in problem
    assert "(No space left on device)" in problem


@pytest.mark.skipif("not __import__('platform').machine() in ('x86_64', 'AMD64')")
def test_a_cpu_without_f16c_is_refused_before_llvm_ends_the_process() -> None:
    code = (
        "import torch\n"
        "from teal_kernels.cpu import Projection\n"
        "try:\n"
        "    w = torch.ones(3, 2).half()\n"
        "    Projection([w], [2])(0, torch.ones(3), torch.zeros(1))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "generic"}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert said == "this CPU does not convert float16: it has no F16C\n"
    code_cache.check_cpu()  # this one has it, as every one since 2013


def test_what_is_kept_is_known_by_what_it_takes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for which CPU it is; a damaged index counts as none."""
    cache = CodeCache(double)
    assert not cache.holds(numba.int64)
    run()
    assert cache.holds(numba.int64)
    assert not cache.holds(numba.float64)
    with monkeypatch.context() as patch:
        target = code_cache.cpu_target.target_context.codegen()
        patch.setattr(type(target), "magic_tuple", lambda self: ("another", "cpu", ""))
        assert not cache.holds(numba.int64)
    (path,) = place.rglob("*.nbi")
    flip(path, 3)
    assert not cache.holds(numba.int64)
