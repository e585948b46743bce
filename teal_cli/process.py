"""What the process owes its surroundings: open streams, an end by signal that leaves a terminal
as it was, and a command line that shows no secret."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

# What ends a program from outside. Where it was started to ignore one (nohup), it does.
_ENDINGS = ("SIGTERM", "SIGHUP", "SIGQUIT")


def open_streams() -> None:
    """Put the null device where the program was started with a closed stream.

    Otherwise the first file that is opened becomes the stream, and what is printed ends in it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a character shows "?"
            stream.reconfigure(errors="replace")


def flush(stream: TextIO) -> OSError | None:
    """Hand out what a stream still holds; where it takes nothing, it goes nowhere.

    Returns:
        The error, which Python would print once more as it ends.
    """
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and its like leave the block as an error does, with exit code 128 + number.

    So everything that the block has begun is put back: the terminal's echo, temporary files,
    other processes. What comes after the first signal is ignored, as it would break that off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_IGN)
        ending = SystemExit(128 + number)
        if (loop := _running_loop()) is None:
            raise ending
        # Raised in the midst of a task, it would be that task's own, to report as a failure.
        loop.call_soon_threadsafe(_raise, ending)

    known = [getattr(signal, name) for name in _ENDINGS if hasattr(signal, name)]
    heard = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _running_loop() -> Any:
    """The event loop that runs in this thread, such as that of the chat's prompt."""
    asyncio = sys.modules.get("asyncio")  # its import takes a tenth of what `--help` may last
    return asyncio and asyncio._get_running_loop()


def _raise(error: BaseException) -> None:
    raise error


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import in the block without looking for garbage, and never look at what it made.

    A hundred thousand objects of torch, transformers and numba stay until the end. Going through
    them again and again, at the end too, took a quarter of a chat's start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def hide(arguments: Sequence[str], option: str) -> None:
    """Overwrite an option's value in the command line that `ps` shows, where Linux allows it."""
    values = [value for name, value in itertools.pairwise(arguments) if name == option]
    values += [a.partition("=")[2] for a in arguments if a.startswith(f"{option}=")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for value in filter(None, values):
            import ctypes

            # The fields after the program's name, which may hold anything: arg_start is the 48th.
            fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
            line, secret = Path("/proc/self/cmdline").read_bytes(), os.fsencode(value)
            at = line.find(secret)
            while at >= 0:
                ctypes.memset(int(fields[45]) + at, ord("*"), len(secret))
                at = line.find(secret, at + len(secret))
