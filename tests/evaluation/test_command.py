"""`teal eval` as a user runs it, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark.commands import Command, prepare, runner


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(folder))
        prepare(tiny_model)
    return folder


@pytest.fixture
def evaluate(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.setenv("TEAL_HOME", str(home))
    return runner("eval", monkeypatch, capsys)


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
    assert document["environment"]["versions"]["torch"]
    low, high = document["sparse"]
    assert (low["target_sparsity"], high["target_sparsity"]) == (0.3, 0.6)
    assert low["realised_sparsity"] == pytest.approx(0.3, abs=0.1)
    assert 0 < low["kl"] < high["kl"]
    assert set(low["realised_by_site"]) == {"attn_in", "attn_out", "mlp_in", "mlp_act"}
    assert document["dense"]["perplexity_standard_error"] > 0


def test_table_has_dense_and_sparse_side_by_side(
    evaluate: Command, tiny_model: Path, text: Path
) -> None:
    code, out, _ = evaluate(
        tiny_model, "--dataset", text, "--context", "64", "--samples", "2", "-s", "0.5", "-q"
    )
    assert code == 0
    title, columns, dense, sparse, *_ = out.splitlines()
    assert "protocol standard: 2 windows of 64 tokens, 126 scored" in title
    assert columns.split()[:2] == ["realised", "perplexity"]
    assert dense.startswith("dense")
    assert sparse.startswith("sparse 0.5")
    assert "±" in sparse
    assert "mlp_act" in out


def test_samples_0_is_the_whole_text(evaluate: Command, tiny_model: Path, text: Path) -> None:
    arguments = ("--context", "64", "--samples", "0", "-s", "0.5", "--json")
    _, out, _ = evaluate(tiny_model, "--dataset", text, *arguments)
    assert json.loads(out)["windows"] == text.stat().st_size // 64  # one token a byte


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-s", "1.0"), 2, "not in [0, 1)"),
        (("-s", "half"), 2, "not a number"),
        (("--context", "513"), 2, "a context of 513 tokens is out of range"),
        (("--protocol", "teal"), 2, "needs a context of 2560 tokens, this model has 512"),
        (("--method", "magic"), 2, "no allocation 'magic'"),
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
    found, out, said = evaluate(tiny_model, *given)
    assert (found, out) == (code, "")
    assert message in " ".join(said.split())
    assert "Traceback" not in said
