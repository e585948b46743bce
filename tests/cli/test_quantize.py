"""The road of a quantized model, as a user walks it: convert, calibrate, eval, bench, chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from benchmark.commands import Command, prepare, runner
from threads import one_thread

from teal_cli.benchmark import bandwidth

Teal = Callable[..., tuple[int, str, str]]
TEXT = ("--samples", "4", "--seq-len", "64")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"Line {n}: the quick brown fox jumps {n * n}.\n" for n in range(400)))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A home with the unquantized model, converted and calibrated."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(folder))
        prepare(tiny_model, ("uniform",))
    return folder


@pytest.fixture
def teal(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Teal:
    """Runs `teal NAME ...`."""
    monkeypatch.setenv("TEAL_HOME", str(home))
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 1 << 26)

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        command: Command = runner(name, monkeypatch, capsys)
        return command(*arguments)

    return run


def test_int4_is_rounded_on_text_unless_told_otherwise(
    teal: Teal, tiny_model: Path, text: Path
) -> None:
    arguments = (tiny_model, "--quantize", "int4", "--json")
    code, out, said = teal("convert", *arguments, "--dataset", text, *TEXT)
    assert code == 0
    assert "rounding on" in said
    found = json.loads(out)
    assert (found["dtype"], found["quantization"]) == ("float16", "int4")
    assert found["rounding"]["method"] == "gptq"
    assert found["rounding"]["settings"]["samples"] == 4
    assert not (Path(found["folder"]) / "work").exists()
    again = json.loads(teal("convert", *arguments)[1])
    assert again == found  # whatever is there serves where nothing is said
    other = json.loads(teal("convert", *arguments, "--rounding", "nearest")[1])
    assert other["rounding"] == {"method": "nearest"}
    assert other["folder"] == found["folder"]
    back = json.loads(teal("convert", *arguments, "--dataset", text, *TEXT)[1])
    assert back["fingerprint"] == found["fingerprint"]  # the same text gives the same integers


def test_text_that_rounding_has_read_is_left_out_of_an_evaluation(
    teal: Teal, tiny_model: Path, text: Path
) -> None:
    quantized = (tiny_model, "--quantize", "int4")
    assert teal("convert", *quantized, "--dataset", text, *TEXT)[0] == 0
    assert teal("calibrate", *quantized, "--dataset", "pydoc", *TEXT)[0] == 0
    options = ("--dataset", text, "--context", 64, "--samples", 2, "-s", "0.5", "--json")
    parts = []
    for model in ((tiny_model,), quantized):
        code, out, _ = teal("eval", *model, *options)
        assert code == 0
        parts.append(json.loads(out)["dataset"]["part"])
    assert parts == ["all of it", "the last quarter"]


def test_every_command_takes_it(teal: Teal, tiny_model: Path, text: Path) -> None:
    quantize = ("--quantize", "int8")  # whose kernels other tests compile too
    code, out, _ = teal("calibrate", tiny_model, *quantize, "--dataset", text, *TEXT, "--json")
    assert code == 0
    assert json.loads(out)["profile"].endswith("float16-int8.safetensors")
    short = ("--tokens", "3", "--prompt-tokens", "4", "--repeats", "1", "-s", "0.5")
    code, out, _ = teal("bench", tiny_model, *quantize, *short, "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["model"]["dtype"], document["model"]["quantization"]) == ("float16", "int8")
    assert [row["dtype"] for row in document["rows"]] == ["int8", "int8"]
    code, _, said = teal("chat", tiny_model, *quantize, "-p", "Hello", "-n", "3")
    assert code == 0
    assert "tokens/s" in said
    code, out, _ = teal("calibrate", tiny_model, *quantize, "--show", "--json")
    assert code == 0


def test_random_weights_of_integers(teal: Teal, tiny_model: Path) -> None:
    short = ("--tokens", "3", "--prompt-tokens", "4", "--repeats", "1", "-s", "0.5")
    arguments = ("--random-weights", "--quantize", "int8", *short)
    code, out, _ = teal("bench", tiny_model, *arguments, "-q")
    assert code == 0
    assert "random weights, int8 (float16)" in out


def test_one_table_of_quantized_and_sparse(
    teal: Teal, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("int8", "int4"):
        made = ("--quantize", name, "--dataset", text, *TEXT, "--force")
        assert teal("calibrate", tiny_model, *made)[0] == 0
    window = ("--dataset", text, "--context", "64", "--samples", "2", "-s", "0.5")
    arguments = (tiny_model, "--quantize", "int4,none,int8", "--method", "uniform", *window)
    code, out, _ = teal("eval", *arguments, "-o", tmp_path / "x.json", "-q")
    assert code == 0
    rows = [line.split("  ")[0] for line in out.splitlines()[2:8]]
    assert rows == ["dense", "uniform", "int4", "int4 uniform", "int8", "int8 uniform"]
    document = json.loads((tmp_path / "x.json").read_text())
    assert [entry["quantization"] for entry in document["quantized"]] == ["int4", "int8"]
    figures = {(row["method"], row["target_sparsity"]): row for row in document["sparse"]}
    assert figures["int8", 0.0]["realised_sparsity"] == 0
    assert 0 < figures["int8", 0.0]["kl"] < figures["int4", 0.0]["kl"]
    assert figures["int4", 0.0]["kl"] < figures["int4 uniform", 0.5]["kl"]
    # Without its own rows, the unquantized model is still what all is compared with.
    code, out, _ = teal("eval", tiny_model, "--quantize", "int8", *window, "--json")
    assert code == 0
    alone = json.loads(out)
    assert [row["method"] for row in alone["sparse"]] == ["int8", "int8 sensitivity"]
    assert alone["sparse"][0]["kl"] == pytest.approx(figures["int8", 0.0]["kl"], rel=1e-6)
    assert alone["model"]["fingerprint"] == document["model"]["fingerprint"]


def test_the_profile_of_the_unquantized_model_is_refused(
    teal: Teal, tiny_model: Path, home: Path
) -> None:
    (plain,) = (home / "data" / "profiles").rglob("float16.safetensors")
    assert teal("convert", tiny_model, "--quantize", "int4-128", "--rounding", "nearest")[0] == 0
    shutil.copy(plain, plain.with_name("float16-int4-128.safetensors"))
    code, _, said = teal("chat", tiny_model, "--quantize", "int4-128", "-s", "0.5", "-p", "x")
    assert code == 1
    assert "was made with other weights than these" in " ".join(said.split())
    code, _, said = teal(
        "calibrate", tiny_model, "--quantize", "int8", "--show", "--dtype", "float32"
    )
    assert code == 3
    assert "has no profile yet" in " ".join(said.split())


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("convert", ("--rounding", "gptq"), "--rounding goes with --quantize"),
        ("convert", ("--seq-len", "64"), "--seq-len goes with --quantize"),
        ("convert", ("--quantize", "int8", "--samples", "4"), "int8 is rounded to the nearest"),
        ("convert", ("--quantize", "int8", "--rounding", "gptq"), "int8 is rounded to the nearest"),
        ("convert", ("--quantize", "int3"), "--quantize"),
        ("eval", ("--quantize", "none,int3"), "no quantization 'int3'"),
        ("calibrate", ("--quantize", "int8", "--import", "x"), "leave out --quantize"),
    ],
)
def test_bad_input_is_one_sentence(
    teal: Teal, tiny_model: Path, command: str, arguments: tuple[str, ...], message: str
) -> None:
    code, out, said = teal(command, tiny_model, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(said.split())
    assert "Traceback" not in said
