"""`teal chat` as a user runs it, on a tiny random model."""

from __future__ import annotations

import io
import re
import signal
import sys
import time
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


def test_dense_needs_no_profile_and_says_so(chat: Chat, base_model: Path) -> None:
    code, _, said = chat(base_model, "-p", "Once upon", "-n", "4", "-s", "0")
    assert code == 0
    assert " · dense · " in said
    assert "alibrat" not in said


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "said"),
    [
        (["-p", "x" * 600], b"", 2, "no room for an answer in a context of 512"),
        (["-p", "x", "--context", "513"], b"", 2, "a context of 513 tokens is out of range"),
        (["-p", "x" * 60, "--context", "40"], b"", 2, "no room for an answer"),
        ([], b"", 2, "the prompt is empty"),
        ([], b"\xff\xfe", 2, "not UTF-8"),
        (["-p", "x", "--method", "astrology"], b"", 2, "astrology"),
        (["-p", "x", "--top-k", "-1"], b"", 2, "top-k"),
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


@pytest.mark.skipif(sys.platform == "win32", reason="pexpect needs a pseudo-terminal")
def test_in_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(
    home: Path, tiny_model: Path
) -> None:
    import os

    import pexpect

    def start() -> pexpect.spawn:
        return pexpect.spawn(
            sys.executable,
            ["-m", "teal_cli", "chat", str(tiny_model), "-s", "0", "-t", "1", "-n", "400"],
            env={**os.environ, "TEAL_HOME": str(home), "NO_COLOR": "1", "TERM": "xterm"},
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            dimensions=(50, 200),
        )

    endings = r"(\d+) tokens? · [^\r\n]* · (numba|torch)( · stopped)?"
    stopped = False
    for _ in range(10):  # a random model may end its answer before it can be stopped
        child = start()
        child.expect(">>> ")
        child.sendline("Hello")
        child.expect("Hello\r\n")
        time.sleep(0.1)
        child.kill(signal.SIGINT)
        if child.expect([endings, pexpect.EOF]) == 0 and child.match.group(3) is not None:
            stopped = True
            break
        child.close(force=True)  # it was at its prompt already, where Ctrl-C leaves
    assert stopped
    child.expect(">>> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
