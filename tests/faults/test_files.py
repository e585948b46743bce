"""Damaged texts, profiles, releases, conversations and notes of teal's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.damage import changed, json_files, outcome, scalars, spoilt, texts, values
from hypothesis import given
from hypothesis import strategies as st

from teal_cli.inference.transcript import Transcript
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import SITES
from teal_cli.progress import Silent
from teal_cli.sparsity.histogram import BINS
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.release import import_release
from teal_cli.sparsity.shape import ModelShape
from teal_cli.store import models
from teal_cli.text.corpora import load_corpus

QUIET = Silent()
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
)
LINE = {"text": "A sentence.", "n": 1}


def lines() -> st.SearchStrategy[bytes]:
    good = st.just(json.dumps(LINE).encode())
    return st.lists(good | json_files(LINE), max_size=5).map(b"\n".join)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "txt"])
@given(data=st.data())
def test_texts(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        content = data.draw(spoilt(parquet()))
    else:
        content = data.draw(lines() if suffix == "jsonl" else st.binary() | texts(LINE))
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content)
    column = data.draw(st.sampled_from([None, "text", "n", "\ud800"]))
    corpus = outcome(
        lambda: load_corpus(
            str(path),
            split_role="calibration",
            column=None if suffix == "txt" else column,
            reporter=QUIET,
        )
    )
    assert corpus is None or all(piece.encode() for piece in corpus.pieces)


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "n": [1, 2]}), sink)
    return bytes(sink.getvalue())


def profile() -> Profile:
    counts = torch.ones(1, len(SITES), BINS, dtype=torch.int64)
    return Profile(
        model="org/model",
        fingerprint="0" * 64,
        shape=ModelShape.of(CONFIG),
        quantiles=Quantiles.from_counts(counts),
        counts=counts,
        allocations={"greedy": torch.linspace(0, 0.9, 3)[:, None, None].expand(3, 1, 7)},
        offsets={"greedy": torch.zeros(4)},
    )


def use_profile(path: Path) -> None:
    loaded = Profile.load(path)
    loaded.check(CONFIG, "0" * 64)
    assert loaded.provenance.get("settings") is None
    for method in loaded.methods:
        for sparsity in (0.0, 0.4, min(loaded.reach(method), 0.99)):
            thresholds = loaded.thresholds(sparsity, method)
            assert thresholds.shape == (1, 7)
            assert thresholds.isfinite().all()
            assert math.isfinite(loaded.model_sparsity(loaded.sparsity_at(thresholds)))


@given(data=st.data())
def test_profile(data: st.DataObject, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    path = tmp_path / "profile.safetensors"
    profile().save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["teal"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    kind = data.draw(st.sampled_from(["header", "tensor", "bytes"]))
    if kind == "bytes":
        path.write_bytes(data.draw(spoilt(path.read_bytes(), within=900)))
    elif kind == "header":
        methods = st.lists(st.sampled_from(["greedy", "uniform", "x"]))
        also = {"methods": methods, "refined": methods}
        text = data.draw(json_files(header, also)).decode("utf-8", "replace")
        path.write_bytes(save(tensors, metadata={"teal": text}))
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        number = data.draw(st.sampled_from([0.0, -1.0, 2.0, 1e30, math.nan, math.inf]))
        sizes = st.lists(st.sampled_from([0, 1, 3, 4, 7, BINS]), max_size=3)
        shape = data.draw(st.just(list(tensors[name].shape)) | sizes)
        dtype = data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float16]))
        tensors[name] = torch.full(shape, number).to(dtype)
        path.write_bytes(save(tensors, metadata={"teal": json.dumps(header)}))
    outcome(lambda: use_profile(path))


def test_release_tables(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    for module in ("self_attn", "mlp"):
        (folder / "histograms" / "layer-0" / module).mkdir(parents=True)
    (folder / "lookup" / "layer-0").mkdir(parents=True)
    centers = torch.linspace(-1, 1, 33)
    whole = {"h1": torch.full((33,), 32.0), "h1_centers": centers}
    whole |= {"h2": torch.full((33,), 32.0), "h2_centers": centers}
    table = "q, k, v, o, gate, up, down\n0.1,0.1,0.1,0.1,0.1,0.1,0.1\n"

    def tensor() -> st.SearchStrategy[Any]:
        number = st.sampled_from([0.0, -1.0, 1e30, math.nan, math.inf])
        flat = st.builds(lambda n, size: torch.full((size,), n), number, st.integers(0, 40))
        return flat | st.just(torch.zeros(2, 2)) | st.just(torch.ones(33, dtype=torch.int8))

    also = {name: tensor() for name in whole}
    cell = st.sampled_from(["nan", "inf", "", "-1", "1e999", "0.5", "x", '"', "\0", "\n", ","])
    rows = st.lists(cell, max_size=12).map(lambda cells: table + ",".join(cells))

    @given(content=changed(whole, also), csv=rows | st.text())
    def check(content: dict[str, Any], csv: str) -> None:
        for module in ("self_attn", "mlp"):
            torch.save(content, folder / "histograms" / "layer-0" / module / "histograms.pt")
        path = folder / "lookup" / "layer-0" / "results.csv"
        path.write_bytes(csv.encode("utf-8", "surrogatepass"))

        def run() -> None:
            made = import_release(folder, CONFIG, model="m", fingerprint=None)
            assert made.thresholds(0.3, "uniform").isfinite().all()
            assert math.isfinite(made.reach("greedy"))

        outcome(run)

    check()


@given(data=st.data())
def test_conversation(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.unlink(missing_ok=True)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Transcript("model", turns).save(path)
    turn = changed(turns[0], {"role": st.sampled_from(["system", "user", "tool"])})
    also = {"messages": st.lists(turn | values(), max_size=3)}
    path.write_bytes(data.draw(json_files(json.loads(path.read_text()), also)))
    outcome(lambda: Transcript.load(path))


NAMES = ["", "~x/y", "\0", "\ud800", "a/" * 3000, "~", "org/na\udcffme"]


@given(name=st.text(max_size=300) | st.sampled_from(NAMES))
def test_model_name(name: str, teal_home: Path) -> None:
    ref = outcome(lambda: models.resolve(name))
    assert ref is None or ref.slug


@given(data=st.data())
def test_last_model(data: st.DataObject, teal_home: Path) -> None:
    ref = models.ModelRef("hub", "org/name")
    models.remember(ref)
    record = {"kind": "hub", "name": "org/name", "path": None, "revision": None}
    path = teal_home / "state" / "last-model.json"
    path.write_bytes(data.draw(json_files(record, {"path": scalars(), "kind": scalars()})))
    outcome(lambda: models.resolve(None).slug)
    models.remember(ref)
    assert models.last_used() == ref
