"""Memory that runs out, and drivers that fail, anywhere in a command: a sentence, no traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from teal_cli import app, console
from teal_cli.chat import answers, editor
from teal_cli.faults import explain
from teal_cli.inference import kernels
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder

FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 77.89 GiB in use."
)
SENTENCE = (
    "error: there is not enough memory on the GPU: 2.50 GiB more were needed, "
    "1.20 GiB of 79.10 GiB are free\n"
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `teal` in this process; return its exit code, stdout and stderr."""
    monkeypatch.setenv("TEAL_HOME", str(home))
    # Compiling the kernels takes longer than all the rest.
    monkeypatch.setattr(kernels, "fused_kernels", fails(ImportError("no numba")))
    monkeypatch.delenv("TEAL_DEBUG", raising=False)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def fails(error: Exception) -> Callable[..., Any]:
    """A function that raises this."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


PLACES = {
    "loading": (Checkpoint, "load"),
    "cache": (Decoder, "new_cache"),
    "fused step": (kernels, "fused_kernels"),
    "prefill": (Session, "prefill"),
    "decode": (Session, "step"),
}


@pytest.mark.parametrize("place", PLACES)
def test_chat(place: str, run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*PLACES[place], fails(FULL))
    code, _, said = run("chat", tiny_model, "-p", "Hi", "-s", "0", "-n", "3", "--device", "cpu")
    assert code == 1
    assert SENTENCE in said
    assert "--quantize" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["calibrate", "bench", "eval"])
def test_other_commands(
    command: str, run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sentence about nothing in particular. " * 200)
    options = {
        "calibrate": ["--dataset", text, "--samples", "2", "--seq-len", "64"],
        "bench": ["--sparsity", "0"],
        "eval": ["--dataset", text, "--sparsity", "0", "--context", "64"],
    }[command]
    for name in ("layer", "forward"):
        monkeypatch.setattr(Decoder, name, fails(FULL))
    monkeypatch.setattr(kernels, "fused_kernels", fails(FULL))
    code, out, said = run(command, tiny_model, *options, "--device", "cpu", "--offline")
    assert (code, out) == (1, ""), said
    assert SENTENCE in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [FULL, RuntimeError("CUDA error: unspecified launch failure"), ZeroDivisionError("oh")],
    ids=["memory", "driver", "bug"],
)
def test_a_chat_goes_on(
    error: Exception, run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["Hi", "Hi", "/bye"])
    monkeypatch.setattr(editor, "open_reader", lambda history: lambda: next(lines))
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(answers, "_silent_keys", nullcontext)  # there is no real terminal
    prefill, failed = Session.prefill, []

    def once(self: Session, *arguments: Any) -> Any:
        if failed:
            return prefill(self, *arguments)
        failed.append(True)
        raise error

    monkeypatch.setattr(Session, "prefill", once)
    options = ("-s", "0", "-n", "4", "-t", "0", "--device", "cpu", "--plain")
    code, _, said = run("chat", tiny_model, *options)
    assert code == 0
    assert f"error: {explain(error).message}\n" in said
    assert "Traceback" not in said
    assert "4 tokens" in said.partition("error: ")[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 4096 bytes. Error code 12"
            ),
            "there is not enough memory: 4096 bytes more were needed",
        ),
        (
            RuntimeError("Triton Error [CUDA]: out of memory"),
            "there is not enough memory on the GPU",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "there is not enough memory on the GPU",
        ),
    ],
)
def test_each_library_says_it_otherwise(error: Exception, sentence: str) -> None:
    assert explain(error).message == sentence
