"""Methods at sparsities: what is compared, and what the comparison found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from teal_cli.evaluation import report, statistics
from teal_cli.evaluation.perplexity import EvalResult, Quality, scores
from teal_cli.evaluation.report import cell
from teal_cli.evaluation.statistics import Estimate
from teal_cli.report.table import Table
from teal_cli.sparsity.setting import Setting
from teal_cli.text.corpora import is_file

_SCHEMA = 2


def on_quantized(quantization: str, settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """A quantized model dense, then its settings; the methods carry its name."""
    named = (
        dataclasses.replace(setting, method=f"{quantization} {setting.method}")
        for setting in settings
    )
    return Setting(quantization, 0.0, None), *named


@dataclass(frozen=True, slots=True)
class Row:
    """What one setting scored, and how it differs from the first method at the same target."""

    method: str
    target_sparsity: float
    recovered: bool  # by vectors
    quality: Quality
    nll_difference: Estimate | None  # nats a token, paired over windows; None for that method

    @property
    def label(self) -> str:
        """As tables name it."""
        return f"{self.method}, recovered" if self.recovered else self.method


@dataclass(frozen=True, slots=True)
class QualityReport:
    """A comparison's rows, and what is needed to repeat it."""

    inputs: dict[str, Any]
    result: EvalResult
    rows: tuple[Row, ...]

    @classmethod
    def of(
        cls, inputs: dict[str, Any], settings: Sequence[Setting], result: EvalResult
    ) -> QualityReport:
        """Pair the settings with the results that `perplexity.evaluate` gave for them."""
        first: dict[float, Quality] = {}
        rows = []
        for setting, quality in zip(settings, result.sparse, strict=True):
            reference = first.setdefault(setting.target_sparsity, quality)
            difference = None
            if reference is not quality:
                difference = statistics.difference(quality.by_window.nll, reference.by_window.nll)
            recovered = setting.vectors is not None
            rows.append(
                Row(setting.method, setting.target_sparsity, recovered, quality, difference)
            )
        return cls(inputs, result, tuple(rows))

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order in which they were asked for; the first is the reference."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def heading(self) -> str:
        """What was measured on what, in one line."""
        model, text = self.inputs["model"]["name"], self.inputs["dataset"]
        name = Path(text["name"]).name if is_file(text["name"]) else text["name"]
        plan, scored = self.result.protocol, str(self.result.windows)
        if self.result.windows < text["windows"]:
            scored += f" of {text['windows']}"
        return (
            f"{model} on {name} ({text['part']}), protocol {plan.name}: "
            f"{scored} windows of {plan.window} tokens, "
            f"{self.result.scored_tokens} scored"
        )

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "kind": "eval",
            "schema": _SCHEMA,
            **self.inputs,
            "protocol": asdict(self.result.protocol),
            "windows": self.result.windows,
            "scored_tokens": self.result.scored_tokens,
            "dense": scores(self.result.dense),
            "sparse": [
                {
                    "method": row.method,
                    "target_sparsity": row.target_sparsity,
                    "recovered": row.recovered,
                    **scores(row.quality),
                    "compared_with": self.methods[0] if row.nll_difference else None,
                    **statistics.flat("nll_difference", row.nll_difference),
                }
                for row in self.rows
            ],
        }

    def records(self) -> list[dict[str, Any]]:
        """One flat record a row, the dense one first."""
        document = self.document()
        dense = {
            "method": "dense",
            "target_sparsity": None,
            "recovered": False,
            **document["dense"],
        }
        return [
            {name: value for name, value in row.items() if not isinstance(value, dict)}
            for row in (dense, *document["sparse"])
        ]

    def header(self) -> dict[str, Any]:
        """Model and machine."""
        return report.header(self.inputs)

    def shown(self) -> Iterator[Table | str]:
        """The figures, then where the sparsity is."""
        yield self._figures()
        sites = self.result.dense.realised_by_site
        yield Table.of(
            self.rows,
            [
                ("realised by site", lambda row: row.label),
                ("target", lambda row: f"{row.target_sparsity:.4g}"),
                *((site, partial(_realised_at, site)) for site in sites),
            ],
        )

    def written(self) -> Iterator[Table | str]:
        """The same, and where it was measured."""
        yield from self.shown()
        yield report.footer(self.inputs)

    def _figures(self) -> Table:
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("", lambda row: row.label),
            ("target", lambda row: f"{row.target_sparsity:.4g}"),
            ("realised", lambda row: f"{row.quality.realised_sparsity:.3f}"),
            ("perplexity", lambda row: cell(row.quality.perplexity, 2)),
            ("to dense", lambda row: cell(row.quality.perplexity_gap, 2, sign=True)),
            ("KL (nats/token)", lambda row: cell(row.quality.kl, 4)),
            ("total variation", lambda row: cell(row.quality.total_variation, 3)),
            ("same top token", lambda row: cell(row.quality.agreement, 3)),
        ]
        if len(self.methods) > 1:
            columns.append(
                (f"NLL to {self.methods[0]}", lambda row: cell(row.nll_difference, 4, sign=True))
            )
        table = Table.of(self.rows, columns, title=[self.heading()])
        dense = ["dense", "", "0.000", cell(self.result.dense.perplexity, 2)]
        table.rows.insert(0, dense + [""] * (len(columns) - len(dense)))
        return table


def _realised_at(site: str, row: Row) -> str:
    return f"{row.quality.realised_by_site[site]:.3f}"
