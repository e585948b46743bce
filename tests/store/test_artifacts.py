"""Artifacts are whole or absent, whatever happens to their writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from reporters import Notes

from teal_cli.errors import MissingError, TealError
from teal_cli.store import artifacts


def script(text: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs `text`, which says "ready" when it has come to the point."""
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_when_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    artifacts.atomic_write(path, b"one")
    artifacts.atomic_write(path, lambda file: print(file.write(b"two")))
    assert path.read_bytes() == b"two"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_that_is_written_over_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    for private in (False, True):
        artifacts.atomic_write(path, b"new", private=private)
        assert path.stat().st_mode & 0o777 == mode
    artifacts.atomic_write(tmp_path / "new", b"new", private=True)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_through_a_link_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to("there/file")
    for content in (b"new", b"over it"):  # at first the link leads to nothing
        artifacts.atomic_write(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
        target.chmod(0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in target.parent.iterdir()] == ["file"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        artifacts.atomic_write(tmp_path / "loop", b"")
    assert (tmp_path / "loop").is_symlink()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError

    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_in_a_folder() -> None:
        with artifacts.atomic_dir(tmp_path / "folder") as folder:
            (folder / "half").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        artifacts.atomic_write(path, fail)
    with pytest.raises(RuntimeError):
        fail_in_a_folder()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder[1]"  # a name that glob would read as a pattern
    for name in ("one", "two"):
        with artifacts.atomic_dir(path) as folder:
            (folder / name).write_bytes(b"")
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o777 & ~current_umask()


WRITE_FILE = """
import sys, time
from pathlib import Path
from teal_cli.store import artifacts

def write(file):
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)

artifacts.atomic_write(Path(sys.argv[1]), write)
"""
WRITE_FOLDER = """
import sys, time
from pathlib import Path
from teal_cli.progress import Silent
from teal_cli.store import artifacts

path = Path(sys.argv[1])
with artifacts.lock(path, Silent()), artifacts.atomic_dir(path) as folder:
    (folder / "half").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_of_a_file_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    kill_when_ready(script(WRITE_FILE, path))
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    artifacts.remove_leftovers(path)
    assert list(tmp_path.iterdir()) == []


def test_the_next_writer_of_a_folder_cleans_up_after_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    kill_when_ready(script(WRITE_FOLDER, path))
    assert not path.exists()
    notes = Notes()
    with artifacts.lock(path, notes), artifacts.atomic_dir(path) as folder:
        (folder / "whole").write_bytes(b"")
    assert notes.notes == []  # the dead process holds no lock
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == ["folder"]
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_what_is_spent_goes_unless_the_work_fails(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with artifacts.spent(folder):  # that is not there
        pass
    folder.mkdir()
    (folder / "states").write_text("hours of work")
    with pytest.raises(OSError, match="no room"), artifacts.spent(folder):
        raise OSError("no room")
    assert (folder / "states").read_text() == "hours of work"
    with artifacts.spent(folder):
        assert not folder.exists()
    assert not list(tmp_path.iterdir())


def test_a_second_process_waits_and_says_so_once(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    first = script(WRITE_FOLDER.replace("time.sleep(60)", "time.sleep(3)"), path)
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    notes = Notes()
    with artifacts.lock(path, notes):
        assert (path / "half").exists()  # the first one has finished
    holder = f"process {first.pid}" if sys.platform == "linux" else "another process"
    (note,) = notes.notes
    assert note.startswith(f"{holder} is making {path}; waiting for it (Ctrl-C ends the waiting")


def test_a_short_wait_for_a_lock_is_not_worth_a_word(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    first = script(WRITE_FOLDER.replace("time.sleep(60)", "time.sleep(0.2)"), path)
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    notes = Notes()
    with artifacts.lock(path, notes):
        assert (path / "half").exists()
    assert notes.notes == []
    assert first.wait() == 0
    first.stdout.close()


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TealError, match=r"the disk is full: .*file could not be written") as caught:
        artifacts.atomic_write(tmp_path / "file", full)
    assert "TEAL_HOME" in str(caught.value.hint)
    with pytest.raises(TealError, match="the disk is full"), artifacts.atomic_dir(tmp_path / "f"):
        full()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TealError, match="the disk is full"):
        artifacts.atomic_write(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_where_the_file_will_be(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there" / "yet"
    artifacts.check_free_space(path, 1)
    with pytest.raises(TealError, match=r"needs 1,000,000\.00 GB"):
        artifacts.check_free_space(path, 10**15)
    assert list(tmp_path.iterdir()) == []


def test_manifests(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(MissingError, match="there is no checkpoint in"):
        artifacts.read_manifest(path, "checkpoint")
    artifacts.write_manifest(path, "checkpoint", {"model": "org/model"})
    assert artifacts.read_manifest(path, "checkpoint")["model"] == "org/model"
    with pytest.raises(TealError, match="not the manifest of a profile"):
        artifacts.read_manifest(path, "profile")
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 99'))
    with pytest.raises(TealError, match="has format 99") as caught:
        artifacts.read_manifest(path, "checkpoint")
    assert "`teal convert org/model --force`" in str(caught.value.hint)
    for damaged in ("", "{", "[]", "\x00"):
        path.write_text(damaged)
        with pytest.raises(TealError):
            artifacts.read_manifest(path, "checkpoint")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TealError, match="is damaged"):
        artifacts.read_manifest(path, "checkpoint")
