"""Finds tasks: of lm-eval by their names, in files of the user's, or made from a text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError, UsageError, whole
from teal_cli.evaluation import text_tasks
from teal_cli.evaluation.text_tasks import Document
from teal_cli.progress import Reporter

SEED = 1234  # lm-eval's default; chooses the examples of few-shot prompts
_GROUP = re.compile(r"^group:", re.MULTILINE)
_NAME = re.compile(rb"^(?:task|group|tag):[ \t]*([\w.-]+)", re.MULTILINE)


def check_specs(specs: Sequence[str]) -> None:
    """Make sure that tasks are there, before a model is loaded for them.

    A name is looked for in the text of lm-eval's files: a second or two, where to read their
    index takes half a minute.

    Raises:
        MissingError: there is no such file.
        UsageError: there is no task of a name.
    """
    for spec in specs:
        if _is_file(spec) and not _path(spec).is_file():
            raise MissingError(f"there is no task file {_path(spec)}")
    unseen, known = {spec for spec in specs if _is_lm_evals(spec)}, set(text_tasks.TASKS)
    for content in _files_of_lm_eval() if unseen else ():
        unseen -= {name for name in unseen if _names(name, content)}
        if not unseen:
            return
        known |= {found.decode() for found in _NAME.findall(content)}
    for name in sorted(unseen):
        raise _no_task(name, known)


def _files_of_lm_eval() -> Iterator[bytes]:
    found = find_spec("lm_eval")
    for folder in (found and found.submodule_search_locations) or ():
        for path in Path(folder, "tasks").rglob("*.yaml"):
            yield path.read_bytes()


def _names(name: str, content: bytes) -> bool:
    """Whether a file has the name as a word; it may stand in a list of tags."""
    word = name.encode()
    return word in content and bool(
        re.search(rb"(?<![\w.-])%s(?![\w-])" % re.escape(word), content)
    )


def _no_task(name: str, known: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, list(known), n=3)
    return UsageError(
        f"lm-eval has no task {name!r}",
        hint=f"Near it: {', '.join(near)}." if near else "See them: lm-eval ls tasks",
    )


def task_manager(specs: Sequence[str], reporter: Reporter) -> Any:
    """lm-eval's index of tasks: of its own where one is named, and of groups in files."""
    from lm_eval.tasks import TaskManager

    files = [_path(spec) for spec in specs if _is_file(spec)]
    # A group names tasks in files beside its own; a single task needs no search of its folder.
    folders = {path.parent: None for path in files if _GROUP.search(path.read_text("utf-8"))}
    named = any(map(_is_lm_evals, specs))
    if named:
        reporter.note("reading lm-eval's index of tasks (14 000 files: up to half a minute)")
    return TaskManager(include_path=list(folders), include_defaults=named)


def load_tasks(
    manager: Any,
    specs: Sequence[str],
    num_fewshot: int | None,
    made: Mapping[str, list[Document]],
) -> Any:
    """The tasks that are named, as lm-eval returns them, each with its number of examples.

    Args:
        manager: lm-eval's index.
        specs: names and files.
        num_fewshot: worked examples before a document, where the task has any.
        made: the documents of tasks that are made from a text.

    Raises:
        UsageError: there is none of a name.
        TealError: one cannot be loaded, shows images, or runs code of the model's.
    """
    in_files = {entry.yaml_path: name for name, entry in manager.task_index.items()}
    wanted: list[Any] = []
    for spec in specs:
        if spec in made:
            wanted.append(_task(spec, made[spec]))
        elif _is_file(spec):
            path = _path(spec)
            wanted.append(in_files.get(path, str(path)))
        elif spec in manager.task_index:
            wanted.append(spec)
        else:
            raise _no_task(spec, manager.all_tasks)
    try:
        loaded = manager.load(wanted)
    except Exception as error:  # a task is a file of the user's or code of lm-eval's
        raise TealError(
            f"{', '.join(specs)} cannot be loaded: {whole(error)}",
            hint=None
            if not any(map(_is_lm_evals, specs))
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


def _task(name: str, documents: list[Document]) -> Any:
    """A task of lm-eval's whose documents are here."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class TextTask(ConfigurableTask):
        def download(self, dataset_kwargs: Any = None, **_: Any) -> None:
            self.dataset = {"test": datasets.Dataset.from_list(documents)}

    return TextTask(config=text_tasks.config(name))


def _is_lm_evals(spec: str) -> bool:
    return not _is_file(spec) and not text_tasks.is_made(spec)


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _path(spec: str) -> Path:
    return Path(spec).expanduser().resolve()
