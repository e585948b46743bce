"""Tasks of lm-eval, dense and sparse: accuracy and whatever else a task measures."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.evaluation import statistics
from teal_cli.evaluation.comparison import Setting
from teal_cli.evaluation.statistics import Estimate
from teal_cli.evaluation.tasks_report import Score, TaskScores, TasksReport
from teal_cli.progress import Reporter
from teal_cli.text.hub_data import network

if TYPE_CHECKING:
    from teal_cli.evaluation.harness import Subject

_SEED = 1234  # lm-eval's default; chooses the examples of few-shot prompts
_GROUP = re.compile(r"^group:", re.MULTILINE)
_BOOTSTRAP = 1000  # resamplings, for metrics whose standard error has no closed form


def require_lm_eval() -> None:
    """Make sure that tasks can be run, before a model is loaded for them.

    Raises:
        MissingError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise MissingError(
            "--tasks needs lm-eval, which is not installed",
            hint="Install it with: pip install 'teal-cli[eval]'",
        )


def run(
    subject: Subject,
    specs: Sequence[str],
    settings: Sequence[Setting],
    inputs: dict[str, Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> TasksReport:
    """Put tasks to the dense model, then to every setting.

    Args:
        subject: the model.
        specs: lm-eval's names of tasks, groups and tags, or paths of task files (.yaml).
        settings: what to compare with the dense model.
        inputs: what the report says about the model and the machine.
        limit: documents of each task, the first ones; None is all.
        num_fewshot: worked examples before each document; None is what each task says, and a
            task that says 0 keeps it.
        offline: take the tasks' documents from the local cache only.
        reporter: follows the requests.

    Raises:
        UsageError: there is no such task.
        TealError: a task cannot be loaded or put to this kind of model.
    """
    import lm_eval

    from teal_cli.evaluation.harness import TealLM

    plan: list[tuple[str, float | None, str, Tensor | None]] = [("dense", None, "dense", None)]
    plan += [(s.method, s.target_sparsity, s.label, s.thresholds) for s in settings]
    rows: list[TaskScores] = []
    with _silenced(), network(not offline):
        manager = _manager(specs, reporter)
        for method, target, label, thresholds in plan:
            _seed()
            loaded = _load(
                manager, specs, num_fewshot
            )  # anew: a task keeps the answers that it has been given
            lm = TealLM(subject, label, thresholds, reporter)
            results = lm_eval.evaluate(
                lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAP
            )
            realised = lm.realised_sparsity()
            dense = {row.task: row for row in rows if row.method == "dense"}
            for name in results["results"]:
                scores = _scores(name, results, dense.get(name))
                if scores:
                    rows.append(TaskScores(name, method, target, realised, scores))
    return TasksReport(
        inputs=inputs
        | {name: metadata.version(name) for name in ("lm_eval", "datasets")}
        | {"limit": limit, "num_fewshot": num_fewshot, "seed": _SEED},
        tasks={name: _about(name, results) for name in loaded["tasks"]},
        groups=loaded["group_map"],
        rows=tuple(rows),
    )


def _seed() -> None:
    """Let tasks that shuffle choices or documents do it alike for every setting."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _manager(specs: Sequence[str], reporter: Reporter) -> Any:
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


def _load(manager: Any, specs: Sequence[str], num_fewshot: int | None) -> Any:
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
            f"{', '.join(specs)} cannot be loaded: {_first_line(error)}",
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
        task.set_fewshot_seed(seed=_SEED)
    return loaded


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def _path(spec: str) -> Path:
    return Path(spec).expanduser().resolve()


def _scores(name: str, results: Any, dense: TaskScores | None) -> tuple[Score, ...]:
    """The metrics of a task or group: lm-eval's keys are "metric,filter"."""
    found = []
    figures = results["results"][name]
    for key, value in figures.items():
        metric, _, filter_ = key.partition(",")
        is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not filter_ or metric.endswith("_stderr") or not is_figure:
            continue
        error = figures.get(f"{metric}_stderr,{filter_}")
        usable = isinstance(error, (int, float)) and math.isfinite(error)
        estimate = Estimate(float(value), float(error) if usable else None)
        single = _by_document(results["samples"].get(name, ()), metric, filter_, estimate.value)
        label = metric if filter_ == "none" else f"{metric} ({filter_})"
        better = results["higher_is_better"].get(name, {}).get(metric)
        before = next((s for s in dense.scores if s.metric == label), None) if dense else None
        found.append(Score(label, estimate, better, single, _to_dense(estimate, single, before)))
    return tuple(found)


def _to_dense(
    estimate: Estimate, single: tuple[float, ...] | None, dense: Score | None
) -> Estimate | None:
    if dense is None:
        return None
    if single is not None and dense.by_document is not None:
        return statistics.difference(single, dense.by_document)
    return Estimate(estimate.value - dense.estimate.value, None)


def _by_document(
    samples: Sequence[Any], metric: str, filter_: str, value: float
) -> tuple[float, ...] | None:
    """What each document scored; None where the metric is not the mean of such scores."""
    rows = [sample for sample in samples if sample["filter"] == filter_]
    single = [sample.get(metric) for sample in sorted(rows, key=lambda row: row["doc_id"])]
    if not single or not all(isinstance(entry, (bool, int, float)) for entry in single):
        return None
    scores = tuple(float(entry) for entry in single)
    return scores if math.isclose(fmean(scores), value, rel_tol=1e-6, abs_tol=1e-9) else None


def _about(name: str, results: Any) -> dict[str, Any]:
    """What a task was: enough to notice that it has changed."""
    samples = {sample["doc_id"]: sample for sample in results["samples"].get(name, ())}
    digest = hashlib.sha256()
    for _, sample in sorted(samples.items()):
        digest.update((sample["doc_hash"] + sample["prompt_hash"]).encode())
    return {
        "version": results["versions"].get(name),
        "few_shot": results["n-shot"].get(name),
        "documents": len(samples),
        "fingerprint": digest.hexdigest(),  # over documents and prompts
        "config": {key: _plain(value) for key, value in results["configs"].get(name, {}).items()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep lm-eval's remarks off stdout, which is for results, and its log for `-v`."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    if not logging.getLogger().handlers:  # nobody has asked for log lines
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
