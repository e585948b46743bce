"""Runs teal in a process of its own that can be killed from within, at a place with a number.

The place is the n-th time that the command touches a file below its home or reports progress: it
can be named and found again, where a clock would hit the imports most of the time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

_EVENTS = {
    f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "chmod", "truncate", "utime")
} | {"open", "os.link", "os.symlink"}
# A server that has imported what takes long, and has run nothing, forks the processes.
_context = get_context("forkserver")
_context.set_forkserver_preload(
    [
        "teal_cli.app",
        "teal_cli.commands.download",
        "teal_cli.commands.eval",
        "teal_cli.evaluation.text_tasks",
        "teal_cli.model.convert",
        "teal_cli.pipeline",
        "teal_cli.sparsified",
        "teal_cli.sparsity.stored",
        "teal_cli.sparsity.streaming",
        "teal_cli.store.hub",
        "teal_cli.text.corpora",
        "teal_cli.text.windows",
        "jinja2.sandbox",
        "pydantic.type_adapter",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_utils_tokenizers",
    ]
)


def run(
    home: Path,
    arguments: list[str],
    *,
    kill_at: int = 0,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `teal` with its home there; return its exit code, -9 where it was killed.

    Its output goes to `output` beside the home, the number of touches to `touches`. What
    `environment` holds comes on top, another TEAL_HOME or Hub too.
    """
    process = _context.Process(
        target=_teal, args=(str(home), arguments, kill_at, dict(environment or {}))
    )
    process.start()
    process.join(120)
    code = process.exitcode
    assert code is not None, "a hang"
    return code


def beside(home: Path, name: str) -> Path:
    """Where a run leaves what is not the home's."""
    return home.with_name(f"{home.name}.{name}")


def _teal(home: str, arguments: list[str], kill_at: int, environment: Mapping[str, str]) -> None:
    import torch

    from teal_cli import app, progress

    seen = 0

    def touch() -> None:
        nonlocal seen
        seen += 1
        if 0 < kill_at <= seen:  # threads may count at once
            os.kill(os.getpid(), signal.SIGKILL)

    def count(event: str, details: tuple[object, ...]) -> None:
        if event in _EVENTS and any(str(d).startswith(home + os.sep) for d in details[:2]):
            touch()

    advance = progress.LineTask.advance

    def advance_counted(task: progress.LineTask, amount: int = 1) -> None:
        touch()
        advance(task, amount)

    progress.LineTask.advance = advance_counted  # type: ignore[method-assign]
    torch.set_num_threads(1)  # the model is too small for two to gain anything
    os.environ.update(TEAL_HOME=home, HF_HUB_OFFLINE="1")
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:
        _use_hub()
    sys.argv = ["teal", *arguments]
    with beside(Path(home), "output").open("w") as file, contextlib.redirect_stdout(file):
        sys.addaudithook(count)
        try:
            app.main()
        finally:
            beside(Path(home), "touches").write_text(str(seen))


def _use_hub() -> None:
    """Import the Hub's client anew, as it reads the environment once; have it write in pieces."""
    os.environ["HF_HUB_OFFLINE"] = "0"
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = 5000
