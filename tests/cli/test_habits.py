"""What people bring from other programs: their commands, their order of words, their mistakes."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from teal_cli import app, console
from teal_cli.chat import answers, prompt
from teal_cli.examples import EXAMPLES

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for the whole module, so that the model is converted once."""
    return tmp_path_factory.mktemp("home")


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `teal` in this process; return its exit code, stdout and stderr."""
    monkeypatch.setenv("TEAL_HOME", str(home))
    monkeypatch.setattr(answers, "_silent_keys", nullcontext)  # there is no real terminal

    def call(*words: str | Path, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", *map(str, words)])
        kind = _Terminal if stdin is None else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(stdin or b"")))
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "llama3"], "In teal that is: teal chat llama3"),
        (["run", "llama3", "Hi there"], "In teal that is: teal chat llama3 'Hi there'"),
        (["run"], "In teal that is: teal chat MODEL"),
        (["pull", "qwen3"], "In teal that is: teal download qwen3"),
        (["pull", "--token", "hf_SECRETsecret", "x"], "In teal that is: teal download MODEL"),
        (["list"], "In teal that is: teal models"),
        (["ls"], "In teal that is: teal models"),
        (["show", "demo"], "In teal that is: teal models"),
        (["rm", "demo"], "In teal that is: teal models --remove demo"),
        (["LIST"], "In teal that is: teal models"),
        (["ps"], "teal models lists what is stored."),
        (["chatt"], "Did you mean teal chat?"),
        (["calibrat"], "Did you mean teal calibrate?"),
        (["xyzzy"], "The commands are chat, serve, bench,"),
        (["help", "xyzzy"], "The commands are chat, serve, bench,"),
        (["hf_SECRETsecret"], "The commands are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_commands_of_others_lead_to_ours(run: Run, words: list[str], hint: str) -> None:
    code, out, said = run(*words)
    assert (code, out) == (2, "")
    assert said.startswith("error: there is no command ")
    assert hint in said.splitlines()[1]
    assert "SECRET" not in said


def test_help_is_a_command(run: Run) -> None:
    assert run("help") == run("--help") == run()
    assert run("help", "chat") == run("chat", "--help")
    assert run("help")[0] == 0


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_ends_with_examples_that_parse(run: Run, command: str) -> None:
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    shown = [line.strip() for line in out.partition("Examples:\n")[2].splitlines()]
    assert shown == list(EXAMPLES[command])
    assert len(shown) >= 2
    assert set(EXAMPLES) == {"", *app._COMMANDS}
    assert all(len(line) < 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ("chat --sparsty 0.4", "teal chat has no option '--sparsty'", "Did you mean --sparsity? "),
        ("calibrate --text a.txt", "calibrate has no option '--text'", "`teal calibrate --help`"),
        (
            "chat --dtype flot16",
            "--dtype takes float16, bfloat16 or float32, not 'flot16'",
            "float16?",
        ),
        (
            "bench --baseline transformer",
            "--baseline takes transformers, compile or llama.cpp",
            "transformers?",
        ),
        ("chat --dtype fp16", "--dtype takes float16", "Did you mean float16? "),
        ("eval demo --quantize in4", "there is no quantization 'in4'", "Did you mean int4? "),
        ("chat --max-tokens 0", "--max-tokens takes 1 or more, not '0'", "teal chat --help"),
        ("chat -n many", "--max-tokens takes a whole number, not 'many'", "teal chat --help"),
        ("chat -t warm", "--temperature takes a number, not 'warm'", "teal chat --help"),
        ("export demo", "no DIR is named", "As in teal export MODEL DIR; `teal"),
        ("export", "no MODEL is named", "`teal export --help`"),
        ("eval a b", "teal eval takes no further argument 'b'", "teal eval --help"),
        ("chat --prompt", "--prompt needs a value", "as in --prompt VALUE"),
        ("chat --plain=3", "--plain takes no value", "Leave it out"),
        ("-q", "no command is named", "teal --help"),
        ("models hf_SECRETsecret", "takes no further argument 'hf_…'", "--help"),
        ("chat -token hf_SECRETsecret", "--temperature takes a number, not 'oken'", "--help"),
        ("chat --hf_SECRETsecret", "has no option", "--help"),
        ("chat demo -p x -s hf_SECRETsecret", "not 'hf_…'", "40%"),
        ("chat hf_SECRETsecret -p x", "there is no model 'hf_…'", "Hub id"),
        ("models --remove hf_SECRETsecret", "no model 'hf_…' is stored", "teal models"),
    ],
)
def test_a_wrong_command_line_has_one_voice(run: Run, words: str, said: str, hint: str) -> None:
    code, out, err = run(*words.split(), stdin=b"")
    sentence, step = err.splitlines()
    assert (code in (2, 3), out) == (True, "")
    assert sentence.startswith("error: ")
    assert said in sentence
    assert hint in step
    assert "SECRET" not in err


def test_what_was_typed_is_made_printable(run: Run) -> None:
    for words in (["a\x1b[2Jb"], ["chat", "--a\x1b[2Jb"], ["chat", "--dtype", "\x1b[2J\u202e"]):
        code, _, said = run(*words)
        assert code == 2
        assert not set(said) & set("\x1b\u202e")


def test_the_prompt_stands_behind_the_model(run: Run, tiny_model: Path) -> None:
    options = ("-n", "8", "-t", "0", "-s", "0", "-q")
    _, expected, _ = run("chat", tiny_model, "-p", "Name three rivers", *options)
    assert expected.strip()
    assert run("chat", tiny_model, "Name three rivers", *options)[:2] == (0, expected)
    assert run("chat", tiny_model, *options, "Name", "three", "rivers")[:2] == (0, expected)
    code, out, said = run("chat", tiny_model, "Hi", "-p", "Hi")
    assert (code, out, "given twice" in said) == (2, "", True)


def test_a_pipe_follows_the_prompt(run: Run, tiny_model: Path) -> None:
    options = ("-n", "8", "-t", "2", "--seed", "1", "-s", "0", "-q")
    _, expected, _ = run("chat", tiny_model, "-p", "Sum up:\n\na b\n", *options)
    _, alone, _ = run("chat", tiny_model, "-p", "Sum up:", *options)
    assert alone != expected
    for typed in (["-p", "Sum up:"], ["Sum", "up:"]):
        assert run("chat", tiny_model, *typed, *options, stdin=b"a b\n")[:2] == (0, expected)
        assert run("chat", tiny_model, *typed, *options, stdin=b" \n")[:2] == (0, alone)
    _, piped, _ = run("chat", tiny_model, *options, stdin=b"a b\n")
    assert run("chat", tiny_model, "-", *options, stdin=b"a b\n")[1] == piped != expected
    assert run("chat", tiny_model, "-p", "x", *options, stdin=b"\xff")[0] == 2


def test_a_pipe_that_brings_nothing_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = threading.Event()

    class Silent(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert told.wait(30)
            return b""

    note = console.ConsoleReporter.note
    monkeypatch.setattr(console, "_settings", console._Settings())
    monkeypatch.setattr(
        console.ConsoleReporter, "note", lambda self, text: (note(self, text), told.set())
    )
    monkeypatch.setattr(prompt, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Silent()))
    assert prompt._piped_text() == ""
    assert "reading stdin to its end" in capsys.readouterr().err


def test_json_is_one_document(run: Run, tiny_model: Path) -> None:
    options = ("-n", "8", "-t", "0", "-p", "Hello")
    _, text, _ = run("chat", tiny_model, *options)
    code, out, said = run("chat", tiny_model, *options, "--json")
    assert code == 0
    assert "tokens/s" in said  # the statistics stay where they are
    document = json.loads(out)
    assert document["answer"].strip() == text.strip()
    assert document["model"] == str(tiny_model)
    assert document["finish_reason"] in ("stop", "length")
    assert (document["sparsity"], document["thinking"]) == (0.25, None)
    assert 0 < document["realised_sparsity"] < 1
    assert document["prompt_tokens"] > 0
    assert 0 < document["new_tokens"] <= 8
    assert document["time_to_first_token_s"] > 0
    assert document["sampling"]["temperature"] == 0
    for words in (["--json"], ["--json", "-p", "x", "--compare"]):
        code, out, said = run("chat", tiny_model, *words)
        assert (code, out, "--json" in said) == (2, "", True)


def test_a_percentage_is_a_share(run: Run, tiny_model: Path) -> None:
    options = ("-n", "4", "-t", "0", "-p", "Hello", "--json")
    code, out, _ = run("chat", tiny_model, *options, "-s", "40%")
    assert (code, json.loads(out)["sparsity"]) == (0, 0.4)
    for command in (["chat", "-p", "x"], ["eval"], ["bench"], ["calibrate", "--show"]):
        code, out, said = run(*command, "-s", "40", stdin=b"")
        assert (code, out) == (2, "")
        assert "0.4 or 40%" in said


def test_prompts_are_kept_where_that_is_asked_for(
    run: Run, home: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr("teal_cli.chat.loop.talk", lambda chat, history: asked.append(history))
    path = home / "state" / "chat-history.jsonl"
    assert run("chat", tiny_model, "-s", "0")[0] == 0
    assert run("chat", tiny_model, "-s", "0", "--history")[0] == 0
    monkeypatch.setenv("TEAL_HISTORY", "1")
    assert run("chat", tiny_model, "-s", "0")[0] == 0
    assert asked == [None, path, path]


def test_a_mistyped_method_is_asked_about(run: Run, tiny_model: Path) -> None:
    code, out, said = run("chat", tiny_model, "-p", "x", "-s", "0.4", "--method", "unifrm", "-q")
    assert (code, out) == (2, "")
    assert "Did you mean uniform? There are: " in said
