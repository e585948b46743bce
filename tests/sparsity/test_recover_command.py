"""`teal calibrate --recover` as a user runs it on a tiny model, and who uses the vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.commands import Command, is_refused, prepare, runner

from teal_cli import pipeline, recovering
from teal_cli.progress import Silent
from teal_cli.sparsity import stored
from teal_cli.sparsity.profile import Profile
from teal_cli.store import models


@pytest.fixture
def command(
    teal_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `teal NAME ...`, where vectors are learnt in two steps."""
    monkeypatch.setitem(recovering.EFFORT, "cpu", (2, 32))

    def named(name: str) -> Command:
        return runner(name, monkeypatch, capsys)

    return named


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"Line {n}: a fox jumps {n * n} times.\n" for n in range(999)))
    return path


@pytest.fixture
def learn(command: Any, tiny_model: Path, text: Path) -> Command:
    """Learns vectors of the tiny model, which has a profile already, at 0.5."""
    prepare(tiny_model, ("sensitivity", "uniform"))

    def run(*more: Any) -> tuple[int, str, str]:
        options = ("--dataset", text, "--samples", 16, "--seq-len", 32, "-s", "0.5")
        found: tuple[int, str, str] = command("calibrate")(
            tiny_model, "--recover", *map(str, options), *map(str, more)
        )
        return found

    return run


def profile_of(model: Path, quantize: str | None = None) -> Profile:
    checkpoint = pipeline.ensure_checkpoint(
        models.resolve(str(model)), quantize=quantize, reporter=Silent()
    )
    found = stored.own_profile(checkpoint)
    assert found is not None
    return found


def test_vectors_are_added_to_the_profile_that_is_there(learn: Command, tiny_model: Path) -> None:
    prepare(tiny_model, ("sensitivity", "uniform"))
    before = profile_of(tiny_model)
    code, _, said = learn()
    assert code == 0
    assert "learning vectors of" in said
    after = profile_of(tiny_model)
    assert torch.equal(after.thresholds(0.5), before.thresholds(0.5))
    recovery = after.recovery["sensitivity"]
    assert recovery.targets == (0.0, 0.5)
    made = recovery.provenance
    assert (made["samples"], made["seq_len"], made["steps"]) == (16, 32, 2)
    assert made["dense"] == after.fingerprint
    assert "--dataset" not in said

    # Again: nothing to do; another target: added to the first.
    assert "up to date" in learn()[2]
    assert learn("-s", "0.3,0.5")[0] == 0
    both = profile_of(tiny_model).recovery["sensitivity"]
    assert both.targets == (0.0, 0.3, 0.5)
    assert torch.equal(both.vectors[2].qkv, recovery.vectors[1].qkv)


def _checkpoint(model: Path) -> Any:
    return pipeline.ensure_checkpoint(models.resolve(str(model)), reporter=Silent())


def test_another_text_takes_force(learn: Command, tiny_model: Path) -> None:
    assert learn()[0] == 0
    is_refused(learn("--seed", 1), 2, "has vectors already, learnt from another text")
    before = profile_of(tiny_model).recovery["sensitivity"].vectors[1].qkv
    assert learn("--seed", 1, "--force")[0] == 0
    assert not torch.equal(profile_of(tiny_model).recovery["sensitivity"].vectors[1].qkv, before)


def test_all_targets_are_of_one_text(
    learn: Command, tiny_model: Path, command: Any, text: Path
) -> None:
    """Another target without a word about the text is learnt from the same, or not at all."""
    assert learn()[0] == 0
    calibrate = command("calibrate")
    assert calibrate(tiny_model, "--recover", "-s", "0.3")[0] == 0
    found = profile_of(tiny_model).recovery["sensitivity"]
    assert found.targets == (0.0, 0.3, 0.5)
    assert found.provenance["dataset"] == str(text)
    text.write_text(text.read_text() + "And another line.")
    is_refused(calibrate(tiny_model, "--recover", "-s", "0.6"), 2, "learnt from another text")
    code, _, said = calibrate(tiny_model, "--recover", "-s", "0.5")
    assert (code, "up to date" in said) == (0, True)


def test_what_makes_no_sense_is_refused(learn: Command, tiny_model: Path, command: Any) -> None:
    is_refused(learn("--samples", 15), 2, "15 windows of text are too few to learn from")
    is_refused(learn("-s", "0"), 2, "there is nothing to win back")
    is_refused(learn("--show"), 2, "leave out --")
    calibrate = command("calibrate")
    is_refused(calibrate(tiny_model, "-s", "0.5"), 2, "--sparsity goes with --show or --recover")
    is_refused(calibrate(tiny_model, "--show", "-s", "0.4,0.5"), 2, "one --sparsity at a time")
    is_refused(calibrate(tiny_model, "--recover", "--import", "x"), 2, "one after the other")


def test_a_quantized_model_learns_from_what_it_was_rounded_from(
    learn: Command, tiny_model: Path
) -> None:
    floats = _checkpoint(tiny_model)
    made = pipeline.ensure_checkpoint(
        models.resolve(str(tiny_model)), quantize="int8", reporter=Silent()
    )
    assert learn("--method", "uniform")[0] == 0
    pipeline.make_profile(made, method="uniform", reporter=Silent(), offline=True)
    # Its thresholds may come from the floats', but the floats' vectors are not for it.
    assert profile_of(tiny_model).setting(0.5, "uniform").vectors is not None
    assert profile_of(tiny_model, "int8").setting(0.5, "uniform").vectors is None
    code, _, said = learn("--quantize", "int8", "--method", "uniform")
    assert code == 0
    assert "what rounding lost" not in said
    found = profile_of(tiny_model, "int8").recovery["uniform"].provenance
    assert found["dense"] == floats.fingerprint != made.fingerprint
    assert found["start"] == f"vectors of {tiny_model} before rounding"


def test_eval_and_chat_use_them_unless_told_otherwise(
    learn: Command, tiny_model: Path, text: Path, command: Any
) -> None:
    assert learn()[0] == 0
    options = (tiny_model, "--dataset", text, "--context", "64", "--samples", "2", "-s", "0.5")
    kl = {}
    for flags in ((), ("--no-recover",)):
        code, out, _ = command("eval")(*options, *flags, "--json")
        assert code == 0
        (row,) = json.loads(out)["sparse"]
        assert row["method"] == "sensitivity"
        assert row["recovered"] == (not flags)
        assert 0 < row["total_variation"] < 1
        kl[flags] = row["kl"]
    assert len(set(kl.values())) == 2
    _, out, _ = command("eval")(*options, "-q")
    assert "sensitivity, recovered" in out
    assert "total variation" in out

    for flags in ((), ("--no-recover",)):
        options = (tiny_model, "hello", "-s", "0.5", "--max-tokens", "3", "--json")
        code, out, said = command("chat")(*options, *flags)
        assert code == 0, said
        assert json.loads(out)["recovered"] == (not flags)


def test_show_has_their_size_by_layer(learn: Command, tiny_model: Path, command: Any) -> None:
    assert learn()[0] == 0
    code, out, _ = command("calibrate")(tiny_model, "--show", "-s", "0.5")
    assert code == 0
    assert "size of the vectors" in out
    assert "at 0.5, from" in " ".join(out.split())
    _, out, _ = command("calibrate")(tiny_model, "--show", "-s", "0.5", "--json")
    sizes = json.loads(out)["vectors"]
    layers = profile_of(tiny_model).shape.num_hidden_layers
    assert list(sizes) == [
        "qkv",
        "o",
        "gate_up",
        "down",
        "input_layernorm",
        "post_attention_layernorm",
    ]
    assert all(len(rows) == layers and min(rows) > 0 for rows in sizes.values())
    _, out, _ = command("calibrate")(tiny_model, "--show", "-s", "0.6", "--json")
    assert json.loads(out)["vectors"] is None


def test_bench_names_them(learn: Command, tiny_model: Path, command: Any) -> None:
    assert learn()[0] == 0
    options = (tiny_model, "-s", "0.5", "--tokens", "4", "--repeats", "1", "--json")
    code, out, said = command("bench")(*options)
    assert code == 0, said
    assert json.loads(out)["model"]["recovered"] is True
    _, out, _ = command("bench")(*options, "--no-recover")
    assert json.loads(out)["model"]["recovered"] is False
