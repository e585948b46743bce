"""What a local path is taken for: folders, GGUF files and their parts, and what is neither."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from teal_cli.errors import MissingError, TealError, UnsupportedError, UsageError
from teal_cli.progress import Silent
from teal_cli.store import hub
from teal_cli.store.local import gguf_parts
from teal_cli.store.models import resolve

pytestmark = pytest.mark.usefixtures("teal_home")
GGUF = b"GGUF\x03\0\0\0"


def put(path: Path, content: bytes = GGUF) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_parts_of_a_model_are_known_by_their_names() -> None:
    second = Path("some/m-00002-of-00003.gguf")
    assert [part.name for part in gguf_parts(second)] == [
        "m-00001-of-00003.gguf",
        "m-00002-of-00003.gguf",
        "m-00003-of-00003.gguf",
    ]
    for whole in ("m.gguf", "m-2-of-3.gguf", "m-00001-of-00002.safetensors", "sha256-0f"):
        assert gguf_parts(Path(whole)) == [Path(whole)]


@pytest.mark.parametrize("named", [1, 2, 3])
def test_any_part_names_the_model(named: int, tmp_path: Path) -> None:
    parts = [put(tmp_path / f"m-0000{n}-of-00003.gguf", GGUF + bytes(n)) for n in (1, 2, 3)]
    source = hub.fetch(resolve(str(parts[named - 1])), reporter=Silent())
    assert source.gguf == parts[0]
    assert source.nbytes == sum(part.stat().st_size for part in parts)
    put(parts[2], GGUF + bytes(9))
    changed = hub.fetch(resolve(str(parts[0])), reporter=Silent())
    assert changed.fingerprint != source.fingerprint
    parts[1].unlink()
    with pytest.raises(MissingError, match=r"m-00002-of-00003\.gguf is missing") as caught:
        hub.fetch(resolve(str(parts[0])), reporter=Silent())
    assert "3 parts" in str(caught.value.hint)
    parts[0].unlink()
    with pytest.raises(MissingError, match=r"m-00001-of-00003\.gguf is missing .*, and 1 more"):
        hub.fetch(resolve(str(parts[2])), reporter=Silent())


def test_links_to_parts_keep_their_names(tmp_path: Path) -> None:
    """As in the Hub's cache, where a name links to a blob."""
    for n in (1, 2):
        blob = put(tmp_path / "blobs" / f"{n}f")
        (tmp_path / f"m-0000{n}-of-00002.gguf").symlink_to(blob)
    source = hub.fetch(resolve(str(tmp_path / "m-00002-of-00002.gguf")), reporter=Silent())
    assert source.gguf == tmp_path / "m-00001-of-00002.gguf"


def test_a_folder_with_one_gguf_model_is_that_model(tmp_path: Path) -> None:
    file = put(tmp_path / "one" / "model.GGUF")
    put(tmp_path / "one" / "config.json", b"{}")
    put(tmp_path / "one" / "mmproj-model-f16.gguf")
    assert resolve(str(tmp_path / "one")).path == file
    assert resolve(str(tmp_path / "one")).kind == "gguf"
    first = put(tmp_path / "split" / "m-00001-of-00002.gguf")
    put(tmp_path / "split" / "m-00002-of-00002.gguf")
    assert resolve(str(tmp_path / "split")).path == first
    put(tmp_path / "one" / "model.safetensors")
    assert resolve(str(tmp_path / "one")).kind == "folder"


def test_of_several_gguf_models_in_a_folder_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        put(tmp_path / name)
    with pytest.raises(UsageError, match=r"a-Q4_K_M\.gguf, b-00001-of-00002\.gguf$"):
        resolve(str(tmp_path))
    for n in range(9):
        put(tmp_path / f"c{n}.gguf")
    with pytest.raises(UsageError, match="and 6 more"):
        resolve(str(tmp_path))


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    blob = put(tmp_path / "blobs" / f"sha256-{'0f' * 32}")
    for path in (blob, put(tmp_path / "model"), put(tmp_path / "model.bin")):
        assert resolve(str(path)).kind == "gguf"
        assert resolve(str(path)).path == path


MANIFEST = {
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "layers": [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:aa"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:bb"},
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "error", "match", "hint"),
    [
        ("m.bin", b"lmgg", UnsupportedError, "ggml", ".gguf"),
        ("m.bin", b"fmgg", UnsupportedError, "ggmf", ".gguf"),
        ("ggml-model-q4_0.bin", b"tjgg\3\0\0\0", UnsupportedError, "ggjt", ".gguf"),
        ("lora.bin", b"algg", UnsupportedError, "LoRA", "model"),
        ("m.safetensors", b"\x40" + bytes(7) + b'{"__meta', UsageError, "safetensors", "folder"),
        ("pytorch_model.bin", b"PK\3\4", UsageError, "PyTorch", "safetensors"),
        ("consolidated.00.pth", b"\x80\2}q", UsageError, "pickle", "safetensors"),
        ("model.h5", b"\x89HDF\r\n", UsageError, "HDF5", "safetensors"),
        ("m.gguf.gz", b"\x1f\x8b\x08", UsageError, "gzip", "Unpack"),
        ("m.gguf", b"version https://git-lfs.github.com/spec/v1", UsageError, "LFS", "git lfs"),
        ("m.gguf", b"\n<!DOCTYPE html><html>", UsageError, "web page", "Download"),
        ("config.json", b'{"a": 1}', UsageError, "JSON", "folder"),
        ("8b", json.dumps(MANIFEST).encode(), UsageError, "ollama manifest", "blobs/sha256-bb"),
        ("8b", b'{"a": "vnd.ollama"', UsageError, "ollama manifest", "blobs/sha256-"),
        ("m.gguf-split-a", GGUF, UsageError, "piece", "cat"),
        ("m.gguf.part2of3", b"any", UsageError, "piece", "cat"),
        ("notes.txt", b"words", UsageError, r"not a \.gguf", "folder"),
        ("empty", b"", UsageError, r"not a \.gguf", "folder"),
    ],
)
def test_what_is_no_gguf_file_is_named(
    name: str, content: bytes, error: type[TealError], match: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match) as caught:
        resolve(str(put(tmp_path / name, content)))
    assert hint in str(caught.value.hint)
    assert name in caught.value.message


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError, match="neither"):
        resolve(str(tmp_path / "pipe.gguf"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llama3:8b-q4_0", "ollama"),
        ("lama-3-8b:latest", "Did you mean llama-3-8b?"),
        ("hf.co/Qwen/Qwen3-8B-GGUF:Q4_K_M", "Qwen/Qwen3-8B-GGUF."),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "Qwen/Qwen3-8B."),
    ],
)
def test_names_of_other_tools_get_a_hint(name: str, hint: str) -> None:
    with pytest.raises(MissingError) as caught:
        resolve(name)
    assert hint in str(caught.value.hint)
