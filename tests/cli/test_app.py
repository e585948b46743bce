"""The program's shell: what it imports, how it exits, what it says when something fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import typer
from benchmark.commands import is_refused, runner

from teal_cli import __version__, app, console
from teal_cli.errors import AccessError, MissingError, TealError, UnsupportedError, UsageError

HEAVY = ("torch", "transformers", "huggingface_hub", "datasets", "numba", "numpy", "rich", "click")

Run = Callable[[Exception | type[BaseException]], tuple[int, str]]


@pytest.fixture(autouse=True)
def _fresh_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_settings", console._Settings())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the program with a command that raises; return its exit code and stderr."""

    def call(error: Exception | type[BaseException]) -> tuple[int, str]:
        program = typer.Typer(pretty_exceptions_enable=False)

        @program.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "build", lambda: program)
        monkeypatch.setattr(sys, "argv", ["teal"])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        assert captured.out == ""
        return int(exit_.value.code or 0), captured.err

    return call


def teal(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "teal_cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


COMMANDS = ("chat", "bench", "eval", "calibrate", "convert", "download", "models")


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom teal_cli import app\n"
        f"sys.argv = ['teal', *{arguments!r}]\n"
        "try:\n    app.main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout.startswith("Usage: teal")


def test_version() -> None:
    done = teal("--version")
    assert (done.returncode, done.stdout) == (0, f"teal {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such"], "teal chat has no option '--no-such'"),
        (["--sparsity", "1"], "a share from 0 to below 1, not '1'"),
        (["--sparsity", "-0.1"], "a share from 0 to below 1"),
        (["--sparsity", "nan"], "a share from 0 to below 1"),
        (["--sparsity", "half"], "a share from 0 to below 1"),
        (["--dtype", "int3"], "float16"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top-p", "1.5"], "top-p"),
        (["--prompt", "x", "--device", "tpu"], "unknown device 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_2_and_print_no_result(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_refused(runner("chat", monkeypatch, capsys)(*arguments), 2, said)


def test_a_usage_error_of_a_process() -> None:
    done = teal("talk")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no command 'talk'\nIn teal that is: teal chat MODEL\n" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TealError("it broke", hint="Mend it."), 1),
        (UsageError("it broke", hint="Mend it."), 2),
        (MissingError("it broke", hint="Mend it."), 3),
        (AccessError("it broke", hint="Mend it."), 4),
        (UnsupportedError("it broke", hint="Mend it."), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_our_errors_are_a_sentence_a_step_and_a_code(run: Run, error: TealError, code: int) -> None:
    assert run(error) == (code, "error: it broke\nMend it.\n")


def test_system_errors_are_explained(run: Run) -> None:
    code, said = run(OSError(errno.ENOSPC, "No space left on device", "some/file"))
    assert code == 1
    assert said.startswith("error: the disk is full: some/file\n")
    code, said = run(PermissionError(errno.EACCES, "Permission denied", "some/file"))
    assert code == 1
    assert said.startswith("error: permission denied: some/file\n")
    code, said = run(MemoryError())
    assert code == 1
    assert said.startswith("error: there is not enough memory\n")


def test_anything_else_is_an_internal_error_without_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = run(ZeroDivisionError("division by zero"))
    assert code == 1
    assert said == (
        "error: internal error (ZeroDivisionError: division by zero), "
        "run with TEAL_DEBUG=1 for the traceback\n"
    )
    monkeypatch.setenv("TEAL_DEBUG", "1")
    code, said = run(ZeroDivisionError("division by zero"))
    assert code == 1
    assert "Traceback" in said
    assert "raise error" in said


def test_debug_shows_the_traceback_of_our_errors_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAL_DEBUG", "1")
    code, said = run(MissingError("it broke"))
    assert code == 3
    assert "Traceback" in said
    assert said.endswith("error: it broke\n")


def test_ctrl_c_exits_130(run: Run) -> None:
    assert run(KeyboardInterrupt)[0] == 130


def test_an_error_that_ctrl_c_caused_is_none() -> None:
    def read(interrupted: bool) -> None:
        try:
            if interrupted:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        raise ValueError("could not determine the shape")

    command = app._with_output_options(read)
    with pytest.raises(ValueError, match="the shape"):
        command(quiet=True, verbose=False, interrupted=False)
    with pytest.raises(KeyboardInterrupt):
        command(quiet=True, verbose=False, interrupted=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_gone_is_no_error(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "teal_cli", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments", [["-q", "hello"], ["hello", "-q"], ["hello", "--quiet"]], ids=" ".join
)
def test_quiet_works_on_either_side_of_the_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hello() -> None:
        """Say hello."""
        console.reporter().note("working")
        print("hello")

    program = app.build()
    program.command("hello")(app._with_output_options(hello))
    monkeypatch.setattr(app, "build", lambda: program)
    monkeypatch.setattr(sys, "argv", ["teal", *arguments])
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [([], False), (["-v", "chat"], True), (["chat", "-v"], True)],
    ids=["default", "before", "after"],
)
def test_library_warnings_are_shown_when_verbose(arguments: list[str], shown: bool) -> None:
    code = (
        "import sys, logging, warnings\nfrom teal_cli import app, console\n"
        "def chat():\n    warnings.warn('old')\n    logging.getLogger('lib').info('line')\n"
        "app._COMMANDS['chat'] = chat\n"
        f"sys.argv = ['teal', *{arguments or ['chat']!r}]\napp.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert (("old" in done.stderr), ("lib: line" in done.stderr)) == (shown, shown)
