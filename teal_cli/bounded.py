"""Runs what a foreign file asks for in a process of its own, with bounds on time and memory.

A template or a tokenizer is a small program: it can run for ever, fill the memory or crash, in
calls of C and Rust that Ctrl-C does not reach. The other process can be ended whatever it does.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from teal_cli.errors import TealError

_SECONDS, _MEGABYTES = 5.0, 256
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class Refused(Exception):
    """The work raised an error, which is told here by its text."""

    def __init__(self, text: str, lineno: int | None = None) -> None:
        super().__init__(text, lineno)
        self.text = text
        self.lineno = lineno  # a template's line, of a syntax error

    def __str__(self) -> str:
        return self.text


class Exceeded(TealError):
    """The work goes beyond a bound, or crashes."""


class Bounded:
    """A function that is called in a forked process, which stays for the next call.

    Where the system cannot fork (Windows), it is called here, without bounds.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        *,
        what: str,
        seconds: float = _SECONDS,
        megabytes: int = _MEGABYTES,
    ) -> None:
        """Name the work; the process starts with the first call.

        Args:
            work: called with what a call is given; its arguments and its result are pickled.
            what: the subject of the messages, such as "the model's chat template".
            seconds: that a call may take.
            megabytes: that it may take beyond what this process has.
        """
        self._work, self._what = work, what
        self._seconds, self._megabytes = seconds, megabytes
        self._process: Any = None
        self._connection: Any = None
        self._parent = os.getpid()

    def __call__(self, *arguments: Any) -> Any:
        """What `work` returns for the arguments.

        Raises:
            Refused: it raised an error.
            Exceeded: it takes too long or too much memory, or crashed.
            TealError: it raised such a one.
        """
        if hasattr(os, "fork"):
            done, outcome = self._ask(arguments)
        else:
            done, outcome = _outcome(self._work, arguments)
        if done:
            return outcome
        if outcome is None:
            self.close()
            raise Exceeded(f"{self._what} takes more than {self._megabytes} MB of memory")
        raise outcome

    def close(self) -> None:
        """End the process; another starts with the next call."""
        process, self._process = self._process, None
        if process is not None and os.getpid() == self._parent:  # a fork's copy ends nothing
            self._connection.close()
            process.kill()
            process.join()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then multiprocessing has ended it, and is half gone itself
            self.close()

    def _ask(self, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        """The outcome of a call in the other process."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(arguments)
            if not self._connection.poll(self._seconds):
                raise Exceeded(f"{self._what} takes more than {self._seconds:g} s")
            reply: tuple[bool, Any] = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise Exceeded(
                f"{self._what} makes the process that reads it crash or run out of memory"
            ) from None
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        return reply

    def _start(self) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(self._work, theirs, self._connection, self._megabytes),
            daemon=True,
        )
        with warnings.catch_warnings(), _tokenizers_silent():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside other threads
            self._process.start()
        theirs.close()


def _serve(work: Callable[..., Any], connection: Any, parents: Any, megabytes: int) -> None:
    """Answer calls until the parent is gone, or ends this process."""
    parents.close()
    _close_sockets(connection.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C comes here too
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ending, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust prints as it fails
    os.environ[_PARALLELISM] = "false"  # its threads did not come along
    _limit_memory(megabytes)
    with suppress(EOFError, OSError):
        while True:
            connection.send(_outcome(work, connection.recv()))


def _close_sockets(kept: int) -> None:
    """Close the parent's connections: what it closes would stay open for their other ends here."""
    with suppress(OSError):
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if number != kept and stat.S_ISSOCK(os.fstat(number).st_mode):
                    os.close(number)


def _outcome(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether the work was done, and what it returns or raises; None where memory ran out."""
    try:
        return True, work(*arguments)
    except MemoryError:
        return False, None
    except (TealError, KeyboardInterrupt) as error:
        return False, error
    except BaseException as error:  # a panic of Rust is no Exception
        return False, Refused(str(error) or type(error).__name__, getattr(error, "lineno", None))


@contextmanager
def _tokenizers_silent() -> Iterator[None]:
    """Keep tokenizers from printing about a fork; it says nothing where this is set to anything."""
    if _PARALLELISM in os.environ:
        yield
        return
    os.environ[_PARALLELISM] = "true"  # as it is without
    try:
        yield
    finally:
        del os.environ[_PARALLELISM]


def _limit_memory(megabytes: int) -> None:
    """Bound what is added to this process's memory, where the system tells what it has."""
    with suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (megabytes << 20)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(most, hard) if hard >= 0 else most, hard))
