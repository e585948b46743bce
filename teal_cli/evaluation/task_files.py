"""Finds tasks of lm-eval, by their names or in files of the user's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError, UsageError, whole
from teal_cli.progress import Reporter

SEED = 1234  # lm-eval's default; chooses the examples of few-shot prompts
_GROUP = re.compile(r"^group:", re.MULTILINE)


def task_manager(specs: Sequence[str], reporter: Reporter) -> Any:
    """lm-eval's index of tasks: of its own where one is named, and of groups in files."""
    from lm_eval.tasks import TaskManager

    files = [_path(spec) for spec in specs if _is_file(spec)]
    for path in files:
        if not path.is_file():
            raise MissingError(f"there is no task file {path}")
    # A group names tasks in files beside its own; a single task needs no search of its folder.
    folders = {path.parent: None for path in files if _GROUP.search(path.read_text("utf-8"))}
    if len(files) < len(specs):
        reporter.note("reading lm-eval's index of tasks (14 000 files: up to half a minute)")
    return TaskManager(include_path=list(folders), include_defaults=len(files) < len(specs))


def load_tasks(manager: Any, specs: Sequence[str], num_fewshot: int | None) -> Any:
    """The tasks that are named, as lm-eval returns them, each with its number of examples.

    Raises:
        UsageError: there is none of a name.
        TealError: one cannot be loaded, shows images, or runs code of the model's.
    """
    in_files = {entry.yaml_path: name for name, entry in manager.task_index.items()}
    wanted = []
    for spec in specs:
        if _is_file(spec):
            path = _path(spec)
            wanted.append(in_files.get(path, str(path)))
        elif spec in manager.task_index:
            wanted.append(spec)
        else:
            near = difflib.get_close_matches(spec, manager.all_tasks, n=3)
            raise UsageError(
                f"lm-eval has no task {spec!r}",
                hint=f"Near it: {', '.join(near)}." if near else "See them: lm-eval ls tasks",
            )
    try:
        loaded = manager.load(wanted)
    except Exception as error:  # a task is a file of the user's or code of lm-eval's
        raise TealError(
            f"{', '.join(specs)} cannot be loaded: {whole(error)}",
            hint=None
            if all(_is_file(spec) for spec in specs)
            else "A task of lm-eval's fetches its documents from the Hub, once.",
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise TealError(f"the task {name} shows images, and this model reads text only")
        if getattr(task, "UNSAFE_CODE", False):
            raise TealError(f"the task {name} runs code that the model writes: teal does not")
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and num_fewshot is not None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _path(spec: str) -> Path:
    return Path(spec).expanduser().resolve()
