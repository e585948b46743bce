"""Runs teal in a process of its own that can be killed from within, at a place with a number.

The place is the n-th time that the command touches a file below its home: it can be named and
found again, where a clock would hit the imports most of the time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
# A server that has imported what takes long, and has run nothing, forks the processes.
_context = get_context("forkserver")
_context.set_forkserver_preload(["teal_cli.app", "teal_cli.pipeline", "teal_cli.sparsified"])


def run(home: Path, arguments: list[str], *, kill_at: int = 0) -> int:
    """Run `teal` with its home there; return its exit code, -9 where it was killed.

    Its output goes to `output` beside the home, the number of touches to `touches`.
    """
    process = _context.Process(target=_teal, args=(str(home), arguments, kill_at))
    process.start()
    process.join(120)
    code = process.exitcode
    assert code is not None, "a hang"
    return code


def beside(home: Path, name: str) -> Path:
    """Where a run leaves what is not the home's."""
    return home.with_name(f"{home.name}.{name}")


def _teal(home: str, arguments: list[str], kill_at: int) -> None:
    seen = 0

    def count(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and details and str(details[0]).startswith(home + os.sep):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.environ.update(TEAL_HOME=home, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.argv = ["teal", *arguments]
    from teal_cli import app

    with beside(Path(home), "output").open("w") as file, contextlib.redirect_stdout(file):
        sys.addaudithook(count)
        try:
            app.main()
        finally:
            beside(Path(home), "touches").write_text(str(seen))
