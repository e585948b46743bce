"""`teal calibrate` as a user runs it, on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.commands import Command, is_refused, runner

from teal_cli import pipeline
from teal_cli.model.sites import PROJECTIONS
from teal_cli.progress import Silent
from teal_cli.sparsity import presets
from teal_cli.sparsity.profile import ModelShape, Profile
from teal_cli.store import models


@pytest.fixture
def calibrate(
    teal_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return runner("calibrate", monkeypatch, capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"Line {n}: a fox jumps {n * n} times.\n" for n in range(999)))
    return path


def stored(home: Path) -> list[Path]:
    return sorted((home / "data" / "profiles").rglob("*.safetensors"))


def test_makes_a_profile_shows_it_and_is_done(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path
) -> None:
    options = (tiny_model, "--dataset", text, "--samples", 3, "--seq-len", 100)
    code, out, err = calibrate(*map(str, options))
    assert code == 0
    (path,) = stored(teal_home)
    assert f"3 windows of 100 tokens → {path}" in err
    assert "attn_in → q, k, v" in out
    assert f"profile: {path}" in err
    assert not list((teal_home / "cache" / "calibration").rglob("*.bin"))

    before = path.stat().st_mtime_ns
    for repeated in (options, (tiny_model,)):
        code, again, err = calibrate(*map(str, repeated))
        assert code == 0
        assert again == out
        assert "up to date" in err
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change", [("--samples", "2"), ("--seq-len", "64"), ("--seed", "1"), ("--force",), "text"]
)
def test_other_options_or_other_text_calibrate_again(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path, change: Any
) -> None:
    options = [str(tiny_model), "--dataset", str(text), "--samples", "3", "--seq-len", "100"]
    calibrate(*options)
    (path,) = stored(teal_home)
    before = path.stat().st_mtime_ns
    if change == "text":
        text.write_text(text.read_text().replace("fox", "dog"))
    else:
        options += change
    code, _, err = calibrate(*options)
    assert code == 0
    assert "up to date" not in err
    assert path.stat().st_mtime_ns > before


def test_without_a_network_or_named_data(calibrate: Command, tiny_model: Path) -> None:
    pytest.importorskip("datasets")
    code, out, err = calibrate(str(tiny_model), "--samples", "2", "--json")
    assert code == 0
    assert "pydoc" in err
    document = json.loads(out)
    assert document["provenance"]["dataset"] == "pydoc"
    assert document["provenance"]["seq_len"] == 512
    assert document["methods"] == ["sensitivity", "uniform"]
    assert torch.tensor(document["thresholds"]["0.5"]).shape == (3, len(PROJECTIONS))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--dataset", "none.txt"), 3, "no file none.txt"),
        (("--dataset", "some/data"), 3, "some/data"),
        (("--seq-len", "5000"), 2, "beyond this model's context of 512"),
        (("--samples", "0"), 2, "samples"),
        (("--import", "nowhere"), 3, "no folder 'histograms'"),
        (("--import", "nowhere", "--seq-len", "64"), 2, "leave out --seq-len"),
        (("--import", "nowhere", "--method", "greedy"), 2, "leave out --method"),
        (("--method", "best"), 2, "best"),
        (("--dataset", "SHORT"), 1, "fewer than one window of 512"),
        (("--dataset", "ROWS", "--column", "body"), 2, "body"),
    ],
)
def test_bad_input_is_one_error(
    calibrate: Command,
    teal_home: Path,
    tiny_model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "rows.jsonl").write_text('{"text": "A row."}\n')
    files = {"SHORT": tmp_path / "short.txt", "ROWS": tmp_path / "rows.jsonl"}
    is_refused(calibrate(tiny_model, *(files.get(a, a) for a in arguments)), code, message)
    assert not stored(teal_home)


def test_another_method_adds_to_the_profile(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path
) -> None:
    options = ("--dataset", str(text), "--samples", "2", "--seq-len", "64")
    code, _, err = calibrate(str(tiny_model), *options, "--method", "uniform")
    assert code == 0
    (path,) = stored(teal_home)
    assert Profile.load(path).methods == ("uniform",)
    code, _, err = calibrate(str(tiny_model), "--method", "sensitivity")
    assert code == 0
    assert "backward through 2 windows" in err
    assert "calibrating (3 layers)" not in err
    profile = Profile.load(path)
    assert profile.methods == ("sensitivity", "uniform")
    assert profile.provenance["seq_len"] == 64
    code, _, err = calibrate(str(tiny_model), *options, "--method", "sensitivity")
    assert code == 0
    assert "up to date" in err


def test_damaged_profile_is_made_again(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path
) -> None:
    options = (str(tiny_model), "--dataset", str(text), "--samples", "2", "--seq-len", "64")
    calibrate(*options)
    (path,) = stored(teal_home)
    good = Profile.load(path).thresholds(0.5)
    path.write_bytes(path.read_bytes()[:500])
    assert calibrate(*options)[0] == 0
    assert torch.equal(Profile.load(path).thresholds(0.5), good)


@pytest.fixture
def built_in(teal_home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    """A profile that comes with teal, for every model of the tiny one's shape."""
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    known = presets.preset_for("mistralai/Mistral-7B-v0.1")
    assert known is not None
    profile = Profile(
        "tiny",
        None,
        ModelShape.of(checkpoint.config),
        type(known.quantiles)(known.quantiles.shares[:3], known.quantiles.values[:3]),
    )
    monkeypatch.setattr(presets, "preset_for", lambda name: profile)
    return profile


def test_built_in_profile_needs_no_calibration(
    calibrate: Command, teal_home: Path, tiny_model: Path, built_in: Profile
) -> None:
    code, _, err = calibrate(str(tiny_model))
    assert code == 0
    assert "up to date" in err
    assert "built into teal" in err
    assert not (teal_home / "data" / "profiles").exists()
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    assert pipeline.ensure_profile(checkpoint, reporter=Silent()) is built_in


def test_built_in_profile_is_not_for_quantized_weights(
    calibrate: Command, teal_home: Path, tiny_model: Path, built_in: Profile
) -> None:
    quantized = (tiny_model, "--quantize", "int8")
    checkpoint = pipeline.ensure_checkpoint(
        models.resolve(str(tiny_model)), quantize="int8", reporter=Silent()
    )
    code, out, said = calibrate(*quantized, "--show")
    assert (code, out) == (3, "")
    assert "has no profile yet" in said
    made = pipeline.ensure_profile(checkpoint, reporter=Silent())
    assert made.fingerprint == checkpoint.fingerprint
    (path,) = stored(teal_home)
    path.unlink()
    code, _, said = calibrate(*quantized)
    assert code == 0
    assert "built into teal" not in said
    assert stored(teal_home) == [path]


def test_two_processes_calibrate_once(teal_home: Path, tiny_model: Path, text: Path) -> None:
    command = [sys.executable, "-m", "teal_cli", "calibrate", str(tiny_model), "--dataset"]
    command += [str(text), "--samples", "16", "--seq-len", "512"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("16 windows of 512 tokens" in err for _, err in results) == 1
    (path,) = stored(teal_home)
    assert Profile.load(path).provenance["samples"] == 16


@pytest.mark.demo
def test_demo_model_realises_its_sparsity(demo_checkpoint: Any) -> None:
    from teal_cli.sparsity.calibrate import SKIPPED_POSITIONS
    from teal_cli.sparsity.calibrate import calibrate as calibrate_decoder
    from teal_cli.text.corpora import load_corpus
    from teal_cli.text.windows import windows

    corpus = load_corpus("pydoc", split_role="calibration", reporter=Silent())
    tokens = windows(demo_checkpoint.tokenizer(), corpus, seq_len=128, samples=3, seed=0)
    decoder = demo_checkpoint.load()
    profile = calibrate_decoder(decoder, tokens, model="demo", reporter=Silent())
    thresholds = profile.thresholds(0.4)
    kept = torch.zeros(decoder.config.num_hidden_layers, 4)
    first = {"attn_in": 0, "attn_out": 3, "mlp_in": 4, "mlp_act": 6}

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        share = (x[SKIPPED_POSITIONS:].abs() <= thresholds[layer, first[site]]).float().mean()
        kept[layer, list(first).index(site)] += share / len(tokens)

    for row in tokens:
        decoder.forward(row, observe=observe)
    assert (kept - 0.4).abs().max() < 0.002
