"""A stretched model's context, in every command that reads text: original × factor."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark.commands import runner

STATED, PROMISED = 64, 256
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": STATED,
}


@pytest.fixture(scope="module")
def stretched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write_model(
        tmp_path_factory.mktemp("stretched") / "tiny-yarn",
        max_position_embeddings=STATED,
        rope_parameters=ROPE,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("chat", ("-p", "x" * 150, "-n", "4", "-s", "0", "--context", "256")),
        ("chat", ("-p", "x" * 150, "-n", "4", "-s", "0")),
        ("eval", ("--dataset", "TEXT", "--context", "256", "--samples", "1", "-s", "0")),
        (
            "calibrate",
            (
                "--dataset",
                "TEXT",
                "--seq-len",
                "256",
                "--samples",
                "1",
                *("--method", "uniform"),
                "--force",
            ),
        ),
    ],
    ids=["chat", "chat-by-default", "eval", "calibrate"],
)
def test_what_the_config_promises_is_there(
    command: str,
    arguments: tuple[str, ...],
    stretched: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEAL_HOME", str(home))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of a text that is long enough.\n" for n in range(60)))
    run = runner(command, monkeypatch, capsys)
    code, _, err = run(stretched, *(str(text) if a == "TEXT" else a for a in arguments))
    assert code == 0, err
    assert command != "calibrate" or f"1 windows of {PROMISED} tokens" in err


@pytest.mark.parametrize(
    ("command", "option", "more"),
    [
        ("chat", "--context", ("-p", "Hi", "-s", "0.5")),
        ("eval", "--context", ("-s", "0")),
        ("calibrate", "--seq-len", ()),
    ],
)
def test_what_is_beyond_is_a_usage_error_that_names_it(
    command: str,
    option: str,
    more: tuple[str, ...],
    stretched: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEAL_HOME", str(home))
    run = runner(command, monkeypatch, capsys)
    code, _, err = run(stretched, option, PROMISED + 1, *more)
    assert code == 2
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert str(PROMISED + 1) in error
    assert f" {PROMISED} " in error
    assert "calibrating" not in err
