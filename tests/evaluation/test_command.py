"""`teal eval` as a user runs it, on a tiny random model."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from benchmark.commands import Command, is_refused


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(
        "".join(f"Line {n}: the quick brown fox jumps {n * n} times.\n" for n in range(99))
    )
    return path


def test_json_holds_everything_to_repeat_it(
    evaluate: Command, tiny_model: Path, text: Path
) -> None:
    arguments = (tiny_model, "--dataset", text, "--context", 128, "--samples", 3, "--json")
    code, out, _ = evaluate(*map(str, arguments), "-s", "0.3,0.6")
    assert code == 0
    document = json.loads(out)
    assert document["protocol"] == {
        "name": "standard",
        "window": 128,
        "stride": 128,
        "sparse_from": 4,
        "scored_from": 1,
    }
    assert (document["windows"], document["scored_tokens"]) == (3, 3 * 127)
    assert len(document["model"]["fingerprint"]) == 64
    assert len(document["dataset"]["fingerprint"]) == 64
    assert document["dataset"]["windows_scored"][::2] == [0, document["dataset"]["windows"] - 1]
    assert document["environment"]["versions"]["torch"]
    low, high = document["sparse"]
    assert (low["target_sparsity"], high["target_sparsity"]) == (0.3, 0.6)
    assert low["realised_sparsity"] == pytest.approx(0.3, abs=0.1)
    assert 0 < low["kl"] < high["kl"]
    assert set(low["realised_by_site"]) == {"attn_in", "attn_out", "mlp_in", "mlp_act"}
    assert document["dense"]["perplexity_standard_error"] > 0
    assert len(low["by_window"]["nll"]) == 3
    assert low["compared_with"] is None


def test_table_has_dense_and_sparse_side_by_side(
    evaluate: Command, tiny_model: Path, text: Path
) -> None:
    code, out, _ = evaluate(
        tiny_model, "--dataset", text, "--context", "64", "--samples", "2", "-s", "0.5", "-q"
    )
    assert code == 0
    title, columns, dense, sparse, *_ = out.splitlines()
    windows = text.stat().st_size // 64  # one token a byte
    assert f"protocol standard: 2 of {windows} windows of 64 tokens, 126 scored" in title
    assert columns.split()[:3] == ["target", "realised", "perplexity"]
    assert dense.startswith("dense")
    assert sparse.split()[:2] == ["sensitivity", "0.5"]
    assert "±" in sparse
    assert "mlp_act" in out


def test_methods_are_compared_in_pairs_with_the_first(
    evaluate: Command, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"out.{suffix}" for suffix in ("json", "csv", "md")]
    arguments = (tiny_model, "--dataset", text, "--context", 64, "--samples", 3, "-s", "0.3,0.6")
    for path in files:
        code, out, _ = evaluate(*arguments, "--method", "uniform,sensitivity", "--output", path)
        assert code == 0
    assert "NLL to uniform" in out
    document = json.loads(files[0].read_text())
    rows = {(row["method"], row["target_sparsity"]): row for row in document["sparse"]}
    assert len(rows) == 4
    for target in (0.3, 0.6):
        uniform, other = rows["uniform", target], rows["sensitivity", target]
        pairs = zip(other["by_window"]["nll"], uniform["by_window"]["nll"], strict=True)
        differences = [a - b for a, b in pairs]
        assert other["nll_difference"] == pytest.approx(statistics.fmean(differences))
        error = statistics.stdev(differences) / math.sqrt(3)
        assert other["nll_difference_standard_error"] == pytest.approx(error)
        assert (uniform["nll_difference"], other["compared_with"]) == (None, "uniform")
    records = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [r["method"] for r in records] == ["dense", *["uniform", "sensitivity"] * 2]
    assert float(records[3]["kl"]) == rows["uniform", 0.6]["kl"]
    assert files[2].read_text().count("| uniform | 0.3 |") == 2


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot_in_every_format(
    evaluate: Command, tiny_model: Path, text: Path, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"quality.{suffix}"
    arguments = ("--dataset", text, "--context", 64, "--samples", 2, "--plot", path)
    code, _, _ = evaluate(tiny_model, *arguments, "--method", "uniform,sensitivity")
    assert code == 0
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)


def test_plot_without_matplotlib_names_the_extra(
    evaluate: Command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal_cli.report.files.find_spec", lambda name: None)
    code, _, said = evaluate(tiny_model, "--plot", "quality.png")
    assert code == 3
    assert "pip install 'teal-cli[plot]'" in said


def test_samples_0_is_the_whole_text(evaluate: Command, tiny_model: Path, text: Path) -> None:
    arguments = ("--context", "64", "--samples", "0", "-s", "0.5", "--json")
    _, out, _ = evaluate(tiny_model, "--dataset", text, *arguments)
    assert json.loads(out)["windows"] == text.stat().st_size // 64  # one token a byte


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-s", "1.0"), 2, "a share from 0 to below 1"),
        (("-s", "half"), 2, "a share from 0 to below 1"),
        (("--context", "513"), 2, "a context of 513 tokens is out of range"),
        (("--protocol", "teal"), 2, "needs a context of 2560 tokens, this model has 512"),
        (("--method", "uniform,greedy"), 2, " --method greedy"),
        (("--method", "magic"), 2, "There are: sensitivity, greedy, uniform."),
        (("--method", ","), 2, "--method names nothing"),
        (("--output", "quality.txt"), 2, "must end in .json, .csv or .md"),
        (("--plot", "quality.jpg"), 2, "must end in .png, .pdf or .svg"),
        (("--context", "512", "--dataset", "SHORT"), 1, "fewer than one window of 512"),
        (("--dataset", "missing.txt"), 3, "there is no file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence(
    evaluate: Command,
    tiny_model: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    given = [str(short) if argument == "SHORT" else argument for argument in arguments]
    is_refused(evaluate(tiny_model, *given), code, message)
