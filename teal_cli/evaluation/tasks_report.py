"""What tasks found, as data and as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from teal_cli.evaluation import report, statistics
from teal_cli.evaluation.report import cell
from teal_cli.evaluation.statistics import Estimate
from teal_cli.report.table import Table

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task, with what each document scored where the metric is their mean."""

    metric: str  # with its filter, where that is not lm-eval's "none"
    estimate: Estimate
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None
    to_dense: Estimate | None = None  # paired over the documents


@dataclass(frozen=True, slots=True)
class TaskScores:
    """One setting's scores in one task or group of tasks."""

    task: str
    method: str  # "dense", or how the sparsity was shared out
    target_sparsity: float | None
    recovered: bool  # by vectors
    realised_sparsity: float  # over everything that the run asked of this setting
    scores: tuple[Score, ...]

    @property
    def shown_method(self) -> str:
        """The method, and whether vectors win back what it loses."""
        return f"{self.method}, recovered" if self.recovered else self.method


@dataclass(frozen=True, slots=True)
class TasksReport:
    """What every setting scored, and what is needed to repeat it."""

    inputs: dict[str, Any]
    tasks: dict[str, dict[str, Any]]  # name → version, few-shot examples, documents, config
    groups: dict[str, list[str]]  # name → its tasks and groups
    rows: tuple[TaskScores, ...]

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "kind": "tasks",
            "schema": _SCHEMA,
            **self.inputs,
            "tasks": self.tasks,
            "groups": self.groups,
            "scores": [
                {
                    **self._place(row),
                    "metric": score.metric,
                    **statistics.flat("value", score.estimate),
                    **statistics.flat("to_dense", score.to_dense),
                    "higher_is_better": score.higher_is_better,
                    "by_document": score.by_document,
                }
                for row in self.rows
                for score in row.scores
            ],
        }

    def records(self) -> list[dict[str, Any]]:
        """One flat record a score."""
        return [
            {name: value for name, value in score.items() if name != "by_document"}
            for score in self.document()["scores"]
        ]

    def header(self) -> dict[str, Any]:
        """Model and machine."""
        return report.header(self.inputs)

    def shown(self) -> Iterator[Table | str]:
        """A table for each group and each task that is in none, a row for each setting."""
        grouped = {name for children in self.groups.values() for name in children}
        for name in dict.fromkeys(row.task for row in self.rows if row.task not in grouped):
            rows = [row for row in self.rows if row.task == name]
            columns: list[tuple[str, Callable[[TaskScores], str]]] = [
                ("", lambda row: row.shown_method),
                ("target", _target),
                ("realised", lambda row: f"{row.realised_sparsity:.3f}"),
            ]
            for number, score in enumerate(rows[0].scores):
                columns.append((score.metric, partial(_value, number)))
                columns.append(("to dense", partial(_to_dense, number)))
            yield Table.of(rows, columns, title=[self._title(name)])
        guesses = self.inputs.get("guesses")
        if guesses and not guesses["rounds"]:
            yield (
                f"{self.inputs['draft']} guessed nothing: a task that scores texts asks for no"
                " answer, and a short one may not pay."
            )
        elif guesses:
            right = f"{guesses['accepted'] / guesses['guessed']:.0%} of {guesses['guessed']}"
            rate = f"{1 + guesses['accepted'] / guesses['rounds']:.1f} tokens a round"
            yield f"Answers were guessed by {self.inputs['draft']}: {right} right, {rate}."

    def written(self) -> Iterator[Table | str]:
        """The same, and where it was measured."""
        yield from self.shown()
        yield report.footer(self.inputs)

    def _title(self, name: str) -> str:
        about = self.tasks.get(name, {})
        shots = about.get("few_shot")
        if about:
            counted = [f"{about['documents']} documents"]
        else:
            counted = [f"a group of {len(self.groups[name])} tasks"]
        counted += [f"{shots} examples in the prompt"] if shots else []
        return f"{self.inputs['model']['name']}, {name}: {', '.join(counted)}"

    @staticmethod
    def _place(row: TaskScores) -> dict[str, Any]:
        return {
            "task": row.task,
            "method": row.method,
            "target_sparsity": row.target_sparsity,
            "recovered": row.recovered,
            "realised_sparsity": row.realised_sparsity,
        }


def _target(row: TaskScores) -> str:
    return "" if row.target_sparsity is None else f"{row.target_sparsity:.4g}"


def _value(number: int, row: TaskScores) -> str:
    return cell(row.scores[number].estimate, 4)


def _to_dense(number: int, row: TaskScores) -> str:
    return cell(row.scores[number].to_dense, 4, sign=True)
