"""Tasks of lm-eval, dense and sparse: accuracy and whatever else a task measures."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from statistics import fmean
from typing import TYPE_CHECKING, Any

from teal_cli.errors import MissingError
from teal_cli.evaluation import statistics
from teal_cli.evaluation.statistics import Estimate
from teal_cli.evaluation.task_files import SEED, load_tasks, task_manager
from teal_cli.evaluation.tasks_report import Score, TaskScores, TasksReport
from teal_cli.evaluation.text_tasks import Document
from teal_cli.progress import Reporter
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.text.hub_data import network

if TYPE_CHECKING:
    from teal_cli.evaluation.harness import Subject

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
    made: Mapping[str, list[Document]],
    limit: int | None = None,
    num_fewshot: int | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> TasksReport:
    """Put tasks to the dense model, then to every setting.

    Args:
        subject: the model.
        specs: lm-eval's names of tasks, groups and tags, paths of task files (.yaml), or names of
            `made`.
        settings: what to compare with the dense model.
        inputs: what the report says about the model and the machine.
        made: the documents of tasks that are made from a text.
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

    rows: list[TaskScores] = []
    with _silenced(), network(not offline):
        manager = task_manager(specs, reporter)
        for setting in (DENSE, *settings):
            _seed()
            # Anew: a task keeps the answers that it has been given.
            loaded = load_tasks(manager, specs, num_fewshot, made)
            lm = TealLM(subject, setting, reporter)
            results = lm_eval.evaluate(
                lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=_BOOTSTRAP
            )
            realised = lm.realised_sparsity()
            if subject.guess is not None and setting is DENSE:
                inputs = inputs | {"guesses": dataclasses.asdict(lm.guesses)}
            target = None if setting is DENSE else setting.target_sparsity
            dense = {row.task: row for row in rows if row.method == DENSE.method}
            for name in results["results"]:
                scores = _scores(name, results, dense.get(name))
                if scores:
                    recovered = setting.vectors is not None
                    rows.append(
                        TaskScores(name, setting.method, target, recovered, realised, scores)
                    )
    return TasksReport(
        inputs=inputs
        | {name: metadata.version(name) for name in ("lm_eval", "datasets")}
        | {"limit": limit, "num_fewshot": num_fewshot, "seed": SEED},
        tasks={name: _about(name, results) for name in loaded["tasks"]},
        groups=loaded["group_map"],
        rows=tuple(rows),
    )


def _seed() -> None:
    """Let tasks that shuffle choices or documents do it alike for every setting."""
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


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
