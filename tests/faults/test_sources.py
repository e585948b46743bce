"""Sources that change, shrink or vanish under the reader, and what stands in a file's place."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model.sources import source_of, write_gguf

from teal_cli.errors import TealError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import read_object
from teal_cli.model.convert import convert, open_reader
from teal_cli.progress import Silent
from teal_cli.store.artifacts import read_manifest
from teal_cli.store.local import model_at
from teal_cli.text.files import read_file

QUIET = Silent()
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(params=["safetensors", "gguf"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A small model: what names it, and the file of its weights."""
    folder = tiny.write_model(tmp_path / "model")
    if request.param == "safetensors":
        return folder, folder / "model.safetensors"
    from transformers import AutoModelForCausalLM

    path = write_gguf(tmp_path / "model.gguf", AutoModelForCausalLM.from_pretrained(folder))
    return path, path


class Meanwhile(Silent):
    """Does something to the source once its weights are being converted."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def task(self, label: str, total: int | None = None, unit: str = "it") -> Any:
        return nullcontext(self)

    def advance(self, amount: int = 1) -> None:
        self._act()


def shrink(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 64)


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)


@pytest.mark.parametrize("act", [shrink, Path.unlink, grow, change], ids=lambda act: act.__name__)
def test_a_source_that_changes_during_convert_is_a_sentence(
    act: Callable[[Path], object], model: tuple[Path, Path], teal_home: Path
) -> None:
    named, weights = model
    done: list[Any] = []

    def once() -> None:
        if not done:
            done.append(act(weights))

    copy = weights.read_bytes()
    with pytest.raises(TealError, match="changed while they were read"):
        convert(source_of(named), reporter=Meanwhile(once))
    assert done
    weights.write_bytes(copy)
    assert Checkpoint(convert(source_of(named), reporter=QUIET)).nbytes > 0


def test_what_was_read_outlives_its_file(model: tuple[Path, Path]) -> None:
    named, weights = model
    reader = open_reader(source_of(named))
    before = reader.read(EMBEDDING, reader.dtype)
    expected = before.clone()
    shrink(weights)  # of a memory map, the next look would end the process
    assert torch.equal(before, expected)
    with pytest.raises(TealError, match="has become shorter"):
        reader.read(EMBEDDING, reader.dtype)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # By a short name: an address holds some hundred bytes.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


ODD = pytest.mark.skipif("sys.platform != 'linux'", reason="made of Linux's files")


def in_time(action: Callable[[], object]) -> BaseException | None:
    """The error that an action ends in; a test fails where it waits for what never comes."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            action()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert found, "it waits"
    return found[0]


@ODD
@pytest.mark.parametrize("make", [_fifo, _socket, _device, _folder], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "read",
    [
        read_object,
        model_at,
        lambda path: read_manifest(path, "checkpoint"),
        lambda path: list(read_file(path)),
    ],
    ids=["config", "model", "manifest", "text"],
)
def test_only_files_are_read(
    read: Callable[[Path], object], make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    make(path)
    error = in_time(lambda: read(path))
    a_model = read is model_at and path.is_dir()
    assert error is None if a_model else isinstance(error, TealError)


@ODD
@pytest.mark.parametrize("make", [_fifo, _socket, _device, _folder], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"],
)
def test_a_model_with_something_else_in_a_files_place(
    name: str, make: Callable[[Path], None], tmp_path: Path, teal_home: Path
) -> None:
    folder = tiny.write_model(tmp_path / "model")
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    error = in_time(lambda: convert(source_of(folder), reporter=QUIET))
    assert isinstance(error, TealError) or (error is None and name.endswith("index.json"))
    assert in_time(lambda: convert(source_of(whole), reporter=QUIET)) is None


def test_descriptions_are_of_a_size_that_such_files_have(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    content = {"a": "b" * 1_000_000}
    path.write_text(json.dumps(content))
    assert read_object(path) == content
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # of holes: it takes no disk
    with pytest.raises(TealError, match="is larger than 64 MB"):
        read_object(path)
