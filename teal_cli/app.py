"""The `teal` program: its commands, its global options and its error boundary."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from teal_cli import console, process, threads, usage
from teal_cli.commands.bench import bench
from teal_cli.commands.calibrate import calibrate
from teal_cli.commands.chat import chat
from teal_cli.commands.convert import convert
from teal_cli.commands.download import download
from teal_cli.commands.eval import evaluate
from teal_cli.commands.export import export
from teal_cli.commands.models import models
from teal_cli.commands.serve import serve
from teal_cli.examples import epilog
from teal_cli.faults import explain
from teal_cli.options import QuietOption, VerboseOption
from teal_cli.version import __version__

# An error this soon after Ctrl-C comes of it: torch, broken off while it reads, has one of its own.
_SAME_CAUSE_S = 2.0
_COMMANDS: dict[str, Callable[..., None]] = {
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "eval": evaluate,
    "calibrate": calibrate,
    "convert": convert,
    "export": export,
    "download": download,
    "models": models,
}


def main() -> None:
    """Run `teal` and exit with its code; every failure ends in one sentence."""
    process.open_streams()
    process.hide(sys.argv, "--token")
    process.hide(sys.argv, "--api-key")
    code: int | str | None = 0
    try:
        with process.ended_by_signals():
            code = build()(prog_name="teal", standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except usage.ParserError as error:
        code = _report(usage.explained(error))
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = _report(error)
    lost = process.flush(sys.stdout)
    if lost is not None and not code:
        code = _report(lost)
    process.flush(sys.stderr)
    sys.exit(code)


def _report(error: Exception) -> int:
    """Print what happened, where anyone is left to read it; return the exit code."""
    if isinstance(error, BrokenPipeError):
        return 1
    try:
        return console.report(error)
    except OSError:  # stderr takes nothing
        return explain(error).exit_code


def build() -> typer.Typer:
    """The Typer app with its commands."""
    app = typer.Typer(
        name="teal",
        help=_root.__doc__,
        epilog=epilog(""),
        cls=usage.Group,
        # Rich's help alone would take most of the 0.4 s that `teal --help` may last.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, command in _COMMANDS.items():
        summary = inspect.cleandoc(command.__doc__ or "").split("\n\n")[0]
        app.command(name, short_help=summary, epilog=epilog(name))(_with_output_options(command))
    return app


def _show_version(value: bool) -> None:
    if value:
        print(f"teal {__version__}")
        raise typer.Exit


def _show_environment(value: bool) -> None:
    if value:
        variables = dict(os.environ)  # as they are before any are set here
        _set_up_libraries()
        from teal_cli.environment import describe

        print(describe(variables))
        raise typer.Exit


def _root(
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    env: Annotated[
        bool,
        typer.Option(
            "--env",
            callback=_show_environment,
            is_eager=True,
            help="Show versions, devices and folders, as a block for a bug report.",
        ),
    ] = False,
) -> None:
    """Run local large language models faster, by skipping what their activations leave unused."""
    console.configure(quiet=quiet, verbose=verbose)


def _with_output_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `-q` and `-v` of its own, so that they work on either side of its name."""

    @functools.wraps(command)
    def wrapped(*, quiet: bool, verbose: bool, **arguments: Any) -> None:
        console.configure(quiet=quiet, verbose=verbose)
        _set_up_libraries()
        with _interruptible():
            command(**arguments)

    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("quiet", QuietOption), ("verbose", VerboseOption))
    ]
    signature = inspect.signature(command, eval_str=True)
    parameters = [*signature.parameters.values(), *flags]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have Ctrl-C end the block quietly, even where a library makes another error of it."""
    pressed_s = -math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed_s
        pressed_s = time.monotonic()
        signal.default_int_handler(number, frame)

    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except KeyboardInterrupt:
        console.end_line()
        raise
    except Exception as error:
        if time.monotonic() - pressed_s > _SAME_CAUSE_S:
            raise
        console.end_line()
        raise KeyboardInterrupt from error
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _set_up_libraries() -> None:
    threads.spin_briefly(os.environ)
    if console.is_verbose():
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        return
    # The libraries draw bars and warn about things that a user of teal cannot change.
    warnings.simplefilter("ignore")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)
