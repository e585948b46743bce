"""`teal chat` as a user runs it, on a tiny random model."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teal_cli import app, console

Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the whole module, so that the model is converted and calibrated once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("base") / "tiny-base", chat=False)


@pytest.fixture
def chat(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run `teal chat` in this process; return its exit code, stdout and stderr."""
    monkeypatch.setenv("TEAL_HOME", str(home))

    def run(*arguments: str | Path, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", "chat", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b"")))
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_one_shot_prints_the_answer_only(chat: Chat, tiny_model: Path) -> None:
    arguments = (tiny_model, "--prompt", "Hello", "-n", "12", "--seed", "1", "-t", "1")
    code, first, said = chat(*arguments)
    assert code == 0
    assert first.endswith("\n")
    statistics = said.splitlines()[-1]
    assert re.match(r"\d+ tokens? · ", statistics)
    assert re.search(r"sparsity 25%, realised \d+\.\d%", statistics)
    code, again, said = chat(*arguments, "-q")
    assert (code, again, said) == (0, first, "")  # nothing is left to make, and the seed holds


def test_an_answer_ends_before_a_stop_text(chat: Chat, tiny_model: Path) -> None:
    arguments = (tiny_model, "--prompt", "Hello", "-n", "20", "-t", "0", "-s", "0")
    whole = chat(*arguments)[1].removesuffix("\n")
    stops = whole[8:10], whole[5:8]
    code, cut, said = chat(*arguments, "--stop", stops[0], "--stop", stops[1])
    assert (code, cut) == (0, whole[: whole.index(stops[1])] + "\n")
    assert "cut off" not in said
    assert chat(*arguments, "--stop", "")[0] == 2


def test_what_a_model_has_no_choice_of_is_said(chat: Chat, tiny_model: Path) -> None:
    code, _, said = chat(tiny_model, "--prompt", "Hi", "--no-think")
    assert (code, "no switch for thinking" in said) == (2, True)
    code, _, said = chat(tiny_model, "--prompt", "Hi", "--template", "rag")
    assert (code, "one chat template" in said) == (2, True)


def test_a_pipe_is_a_prompt(chat: Chat, tiny_model: Path) -> None:
    options = ("-n", "8", "--seed", "3", "-s", "0", "-q")
    _, expected, _ = chat(tiny_model, "--prompt", "Grüße\n", *options)
    for arguments in [(), ("--prompt", "-")]:
        code, out, _ = chat(tiny_model, *arguments, *options, stdin="Grüße\n".encode())
        assert (code, out) == (0, expected)


def test_without_a_name_it_is_the_last_model(chat: Chat, tiny_model: Path) -> None:
    options = ("-p", "Hello", "-n", "8", "--seed", "3", "-s", "0")
    _, expected, _ = chat(tiny_model, *options)
    code, out, _ = chat(*options)
    assert (code, out) == (0, expected)


def test_the_authors_settings_count_unless_an_option_does(
    chat: Chat, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "tiny-authored")
    settings = {"do_sample": True, "top_k": "many", "repetition_penalty": 0.02, "num_beams": 4}
    (model / "generation_config.json").write_text(json.dumps(settings))
    arguments = (model, "-p", "Hello", "-n", "8", "-s", "0", "-t", "0")
    code, out, said = chat(*arguments)
    assert (code, out) == (1, "")
    assert "generation_config.json has top_k 'many'" in said
    assert "--top-k" in said

    code, penalised, said = chat(*arguments, "--top-k", "-1")
    assert code == 0
    assert "num_beams 4" in said
    assert "top_k" not in said
    code, plain, _ = chat(*arguments, "--top-k", "-1", "--repetition-penalty", "1")
    assert (code, plain == penalised) == (0, False)
    _, dense, _ = chat(tiny_model, *arguments[1:])
    assert dense == plain
    code, _, said = chat(*arguments, "--min-p", "2")
    assert code == 2
    assert "min-p must be from 0 to 1" in said


def test_the_first_answer_takes_quick_thresholds(
    chat: Chat, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))
    arguments = (tiny_model, "-p", "Hello", "-n", "4")
    for first in (True, False):
        code, _, said = chat(*arguments)
        assert code == 0
        assert f"`teal calibrate {tiny_model}` makes better ones" in said
        assert ("4 windows of 512 tokens" in said) == first
        assert "backward" not in said
    # A method that only a whole calibration has is made.
    code, _, said = chat(*arguments, "--method", "sensitivity")
    assert code == 0
    assert "backward" in said
    assert "quick thresholds" not in said
    assert "quick thresholds" not in chat(*arguments)[2]


def test_dense_needs_no_profile_and_says_so(chat: Chat, base_model: Path) -> None:
    code, _, said = chat(base_model, "-p", "Once upon", "-n", "4", "-s", "0")
    assert code == 0
    assert " · dense · " in said
    assert "alibrat" not in said


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (["-p", "x" * 600], b"", 2, "no room for an answer in a context of 512"),
        (["-p", "x", "--context", "513"], b"", 2, "beyond this model's context of 512"),
        (["-p", "x" * 60, "--context", "40"], b"", 2, "no room for an answer"),
        ([], b"", 2, "the prompt is empty"),
        ([], b"\xff\xfe", 2, "not UTF-8"),
        (["-p", "x", "--method", "astrology"], b"", 2, "astrology"),
        (["-p", "x", "--top-k", "-2"], b"", 2, "top-k"),
        (["-p", "x", "--device", "cuda:99"], b"", 5, "CUDA"),
    ],
    ids=["long", "context", "short-context", "empty", "bytes", "method", "top-k", "device"],
)
def test_what_cannot_be_done_is_one_sentence(
    chat: Chat, tiny_model: Path, arguments: list[str], stdin: bytes, code: int, said: str
) -> None:
    actual, out, err = chat(tiny_model, *arguments, "-q", stdin=stdin)
    assert (actual, out) == (code, "")
    assert err.startswith("error: ")
    assert said in err


def test_a_base_model_takes_no_system_message(chat: Chat, base_model: Path) -> None:
    code, out, err = chat(base_model, "-p", "x", "-s", "0", "--system", "Be brief.", "-q")
    assert (code, out) == (2, "")
    assert "no chat template" in err


def test_an_unknown_model_is_missing(chat: Chat) -> None:
    code, out, err = chat("no-such-model", "-p", "x")
    assert (code, out) == (3, "")
    assert "no-such-model" in err


def test_compare_shows_both(chat: Chat, tiny_model: Path) -> None:
    options = ("-p", "Hello", "-n", "8", "--seed", "3", "-t", "1")
    code, out, said = chat(tiny_model, *options, "--compare", "-s", "0.5")
    assert code == 0
    assert out.startswith("dense\n")
    assert "\nsparsity 0.5\n" in out
    assert said.count("tokens/s") <= 2
    assert chat(tiny_model, *options, "--compare", "-s", "0")[0] == 2


def test_a_damaged_generation_config_is_one_sentence(
    chat: Chat, tmp_path: Path, tiny_model: Path
) -> None:
    import json
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for fields in ({"do_sample": True, "top_k": "many"}, {"eos_token_id": ["a"]}):
        (model / "generation_config.json").write_text(json.dumps(fields))
        code, out, err = chat(model, "-p", "x", "-s", "0", "-q")
        assert (code, out) == (1, "")
        assert err.startswith("error: ")
        assert "internal" not in err


def test_bytes_on_the_command_line_that_are_no_utf8_do_no_harm(
    chat: Chat, tiny_model: Path
) -> None:
    assert (
        chat(tiny_model, "-p", "a\udcff", "--system", "\udcff", "-s", "0", "-q", "-n", "2")[0] == 0
    )
