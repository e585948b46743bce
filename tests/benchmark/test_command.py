"""`teal bench` as a user runs it, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark.commands import Command, is_refused, prepare, runner

from teal_cli.benchmark import bandwidth

SHORT = ("--tokens", "4", "--prompt-tokens", "8", "--repeats", "2", "-s", "0.5")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(folder))
        prepare(tiny_model)
    return folder


@pytest.fixture
def bench(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.setenv("TEAL_HOME", str(home))
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 1 << 26)
    return runner("bench", monkeypatch, capsys)


def test_card_and_figures_of_a_real_model(bench: Command, tiny_model: Path) -> None:
    code, out, _ = bench(tiny_model, *SHORT, "-q")
    assert code == 0
    card, figures = out.split("\n\n")
    assert card.startswith("Memory: ")
    assert [line.split("  ")[0] for line in card.splitlines()[2:]] == ["dense", "sparse 0.5"]
    assert "4 tokens after a prompt of 8, median of 2" in figures
    assert [line.split("  ")[0] for line in figures.splitlines()[3:]] == ["dense", "sparse 0.5"]
    lines = out.replace(str(tiny_model), "tiny-llama").splitlines()  # wherever this test runs
    assert max(map(len, lines)) <= 100


def test_json_and_every_file(bench: Command, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "figure.png"
    for suffix in (".json", ".csv", ".md"):
        arguments = ("--output", tmp_path / f"x{suffix}", "--plot", plot, "--json")
        code, out, _ = bench(tiny_model, *SHORT, *arguments)
        assert code == 0
        document = json.loads(out)
    assert document["model"]["weights"] == "its own"
    assert len(document["model"]["fingerprint"]) == 64
    assert document["settings"]["tokens"] == 4
    assert [row["label"] for row in document["rows"]] == ["dense", "sparse 0.5"]
    assert set(json.loads((tmp_path / "x.json").read_text())) == set(document)
    assert (tmp_path / "x.csv").read_text().startswith("label,kind,")
    assert "| dense |" in (tmp_path / "x.md").read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_random_weights_at_the_shape_of_a_folder(bench: Command, tiny_model: Path) -> None:
    arguments = ("--random-weights", "--dtype", "float32", "--json")
    code, out, _ = bench(tiny_model, *SHORT, *arguments)
    assert code == 0
    document = json.loads(out)
    assert document["model"]["weights"] == "random"
    assert document["model"]["dtype"] == "float32"
    assert document["model"]["shape"]["hidden_size"] == 64
    assert document["rows"][1]["realised_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_kernels_one_by_one(bench: Command, tiny_model: Path, tmp_path: Path) -> None:
    for suffix in (".json", ".csv", ".md"):
        arguments = ("--kernels", "--repeats", "2", "-s", "0.5", "-o", tmp_path / f"x{suffix}")
        code, out, _ = bench(tiny_model, *arguments, "--json")
        assert code == 0
        document = json.loads(out)
    assert (document["kind"], document["model"]["weights"]) == ("kernels", "its own")
    assert [row["kernel"] for row in document["rows"]][::2] == ["qkv", "o", "gate_up", "down"]
    assert set(json.loads((tmp_path / "x.json").read_text())) == set(document)
    assert (tmp_path / "x.csv").read_text().startswith("kernel,")
    assert "| qkv |" in (tmp_path / "x.md").read_text()
    code, out, _ = bench(tiny_model, "--random-weights", *arguments[:5], "-q")
    assert code == 0
    assert "× F.linear" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-s", "1"), 2, "a share from 0 to below 1"),
        (("--tokens", "600"), 2, "longer than this model's context of 512"),
        (("--tokens", "1"), 2, "--tokens"),
        (("--output", "x.txt"), 2, "must end in .json, .csv or .md"),
        (("--plot", "x.gif"), 2, "must end in .png, .pdf or .svg"),
        (("--baseline", "vllm"), 2, "--baseline"),
        (("--method", "magic"), 2, "there is no method 'magic'"),
        (("--kernels", "--baseline", "compile"), 2, "take neither --baseline nor --plot"),
        (("--tune", "--device", "cpu"), 5, "--tune is for the GPU's kernels"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence(
    bench: Command, tiny_model: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    is_refused(bench(tiny_model, *arguments), code, message)


def test_a_shapes_name_is_a_models_without_random_weights(bench: Command) -> None:
    code, _, said = bench("llama-2-7b")
    assert code == 3
    assert "meta-llama/Llama-2-7b-chat-hf is not on this machine" in said
