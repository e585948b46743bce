"""`teal calibrate` as a user runs it, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.commands import Command, is_refused, runner

from teal_cli import pipeline
from teal_cli.model.sites import PROJECTIONS
from teal_cli.progress import Silent, Task
from teal_cli.sparsity import presets, release
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.shape import ModelShape
from teal_cli.store import models
from teal_cli.text.sample import SampleSettings


class Notes(Silent):
    """Keeps what it is told; presses Ctrl-C once so many layers are done."""

    def __init__(self, pressed_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.labels: list[str] = []
        self.expected: list[tuple[float | None, ...]] = []
        self.steps = 0
        self._left = pressed_after

    def note(self, message: str) -> None:
        self.notes.append(message)

    def expect(self, costs: Sequence[float | None]) -> None:
        self.expected.append(tuple(costs))

    def skip(self) -> None:
        self.steps += 1

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        self.labels.append(label)
        self.steps += 1
        yield self

    def advance(self, amount: int = 1) -> None:
        if self._left is not None and amount:
            self._left -= amount
            if self._left == 0:
                raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three windows of the usual text where a user has 16."""
    assert SampleSettings().seq_len == 512
    monkeypatch.setattr(SampleSettings.__init__, "__defaults__", (None, None, 3, 512, 0))


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
    "change", [("--samples", "2"), ("--seq-len", "64"), ("--seed", "1"), (), "text", "import"]
)
def test_a_profile_is_replaced_only_by_force(
    calibrate: Command,
    teal_home: Path,
    tiny_model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
) -> None:
    options = [str(tiny_model), "--dataset", str(text), "--samples", "3", "--seq-len", "100"]
    calibrate(*options)
    (path,) = stored(teal_home)
    before, written_ns = path.read_bytes(), path.stat().st_mtime_ns
    if change == "text":
        text.write_text(text.read_text().replace("fox", "dog"))
    elif change == "import":
        monkeypatch.setattr(
            release,
            "import_release",
            lambda *_, **__: dataclasses.replace(Profile.load(path), provenance={"dataset": "x"}),
        )
        options = [str(tiny_model), "--import", str(tmp_path)]
    else:
        options += change
    code, out, err = calibrate(*options)
    if change:
        assert (code, out) == (2, "")
        assert "has a profile already" in err
        assert "3 windows of 100 tokens" in err
        assert "--force" in err
    assert path.read_bytes() == before
    code, _, err = calibrate(*options, "--force")
    assert code == 0
    assert "up to date" not in err
    assert path.stat().st_mtime_ns != written_ns  # its bytes may be the same within a second
    if change == "import":
        assert calibrate(*options)[0] == 0  # the same again takes nothing away
        assert calibrate(str(tiny_model), "--method", "greedy")[0] == 2


def test_quick_thresholds_are_replaced_without_a_question(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path
) -> None:
    pytest.importorskip("datasets")
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    said = Notes()
    quick = pipeline.ensure_profile(checkpoint, quick=True, reporter=said)
    assert quick.quick
    assert quick.provenance["samples"] == 4
    assert quick.methods == ("uniform",)
    assert f"`teal calibrate {tiny_model}` makes better ones" in said.notes[-1]
    assert pipeline.ensure_profile(checkpoint, quick=True, reporter=said).quick  # as it is
    assert sum("calibrating" in note for note in said.notes) == 1

    code, _, err = calibrate(
        str(tiny_model), "--dataset", str(text), "--samples", "3", "--method", "uniform"
    )
    assert code == 0
    assert "up to date" not in err
    (path,) = stored(teal_home)
    assert not Profile.load(path).quick
    assert not pipeline.ensure_profile(checkpoint, quick=True, reporter=Silent()).quick


def test_what_wants_the_best_replaces_quick_thresholds(
    teal_home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    assert pipeline.ensure_profile(checkpoint, quick=True, reporter=Silent()).quick
    (path,) = stored(teal_home)
    best = pipeline.ensure_profile(checkpoint, reporter=Silent())
    assert (best.quick, best.default_method) == (False, "sensitivity")
    assert Profile.load(path).methods == best.methods


@pytest.mark.parametrize("quick", [False, True])
def test_a_quantized_model_starts_from_its_floats(
    calibrate: Command, teal_home: Path, tiny_model: Path, text: Path, quick: bool
) -> None:
    pytest.importorskip("datasets")
    calibrate(str(tiny_model), "--dataset", str(text), "--samples", "2", "--seq-len", "64")
    (path,) = stored(teal_home)
    floats = Profile.load(path)
    ref = models.resolve(str(tiny_model))
    rounded = pipeline.ensure_checkpoint(ref, quantize="int8", reporter=Silent())
    said = Notes()
    profile = pipeline.ensure_profile(rounded, quick=quick, reporter=said)
    assert not any("backward" in label for label in said.labels)
    assert any("sensitivity at 0.5" in label for label in said.labels) != quick
    assert torch.equal(profile.allocations["sensitivity"], floats.allocations["sensitivity"])
    assert profile.fingerprint == rounded.fingerprint
    assert not torch.equal(profile.thresholds(0.5), floats.thresholds(0.5))
    assert "without quantization" in profile.provenance["allocations"]

    code, _, err = calibrate(str(tiny_model), "--quantize", "int8", "--force")
    assert code == 0
    assert "backward" in err  # its own search


def test_quick_thresholds_of_floats_are_no_start(teal_home: Path, tiny_model: Path) -> None:
    pytest.importorskip("datasets")
    ref = models.resolve(str(tiny_model))
    floats = pipeline.ensure_checkpoint(ref, reporter=Silent())
    pipeline.ensure_profile(floats, quick=True, reporter=Silent())
    rounded = pipeline.ensure_checkpoint(ref, quantize="int8", reporter=Silent())
    said = Notes()
    pipeline.ensure_profile(rounded, reporter=said)
    assert any("backward" in label for label in said.labels)


@pytest.mark.parametrize("quick", [False, True])
def test_ctrl_c_says_what_is_kept(
    calibrate: Command, teal_home: Path, tiny_model: Path, quick: bool
) -> None:
    pytest.importorskip("datasets")
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    pressed = Notes(pressed_after=2)
    with pytest.raises(KeyboardInterrupt):
        pipeline.ensure_profile(checkpoint, quick=quick, reporter=pressed)
    assert f"`teal chat {tiny_model} -s 0` answers now" in pressed.notes[-1]
    assert "layers that are done are kept: the same command goes on" in pressed.notes[-1]
    again = Notes()
    pipeline.ensure_profile(checkpoint, quick=True, reporter=again)
    resumed = any("resuming at layer 3" in note for note in again.notes)
    assert resumed == quick
    again = Notes()
    pipeline.ensure_profile(checkpoint, reporter=again)  # quick ones have cost it nothing
    assert any("resuming at layer 3" in note for note in again.notes) != quick
    assert not list((teal_home / "cache" / "calibration").rglob("*.bin"))


@pytest.mark.parametrize("methods", [(), ("sensitivity", "uniform"), ("greedy", "uniform")])
def test_every_task_was_announced(
    teal_home: Path, tiny_model: Path, methods: tuple[str, ...]
) -> None:
    pytest.importorskip("datasets")
    said = Notes()
    checkpoint = pipeline.ensure_checkpoint(models.resolve(str(tiny_model)), reporter=Silent())
    method = methods[0] if methods else None
    pipeline.make_profile(checkpoint, method=method, quick=not methods, reporter=said)
    assert said.steps == len(said.expected[0]) > 0
    assert said.expected[-1] == ()
    if methods == ("sensitivity", "uniform"):
        said = Notes()
        settings = SampleSettings()
        pipeline.make_profile(checkpoint, settings, method="greedy", reporter=said)
        assert said.steps == len(said.expected[0]) > 0


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
    monkeypatch.setattr(presets, "preset_for", lambda name, source="": profile)
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
