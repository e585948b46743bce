"""A comparison's result as a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from teal_cli.evaluation.comparison import QualityReport
from teal_cli.evaluation.statistics import Estimate

# Okabe and Ito's palette without its yellow, which is faint on white; the markers tell the
# methods apart in grey too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_WIDE = 4  # times the smallest value from which on an axis is logarithmic
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(report: QualityReport, suffix: str) -> bytes:
    """Perplexity and KL against realised sparsity, a line for each method.

    Bars are standard errors over the windows. Perplexity's is paired with the dense model's: it
    is the error of the distance to the horizontal line. An axis whose values differ by much is
    logarithmic; KL's then has no place for the dense model's zero.

    Args:
        report: what to draw.
        suffix: the format, .png, .pdf or .svg.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = report.result.dense
    line: dict[str, Any] = {"color": "#555555", "linewidth": 1.1, "linestyle": "--", "zorder": 1}
    left.axhline(dense.perplexity.value, label="dense", **line)
    right.axhline(0, **line)
    for number, method in enumerate(report.methods):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 4.5,
            "linewidth": 1.4,
            "capsize": 2.5,
            "elinewidth": 0.9,
            "zorder": 3,
        }
        rows = [row for row in report.rows if row.method == method]
        found = sorted((row.quality for row in rows), key=lambda q: q.realised_sparsity)
        realised = [quality.realised_sparsity for quality in found]
        for axes, values, errors in (
            (left, [q.perplexity.value for q in found], [_error(q.perplexity_gap) for q in found]),
            (right, [q.kl.value for q in found], [_error(q.kl) for q in found]),
        ):
            axes.errorbar(realised, values, yerr=errors, label=method, **style)
    found = [row.quality for row in report.rows]
    _finish(left, "perplexity", [dense.perplexity.value, *(q.perplexity.value for q in found)])
    _finish(right, "KL to dense (nats per token)", [quality.kl.value for quality in found])
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], loc="upper left", fontsize=8, frameon=False)
    title = report.heading().replace(", protocol", "\nprotocol", 1)
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), dpi=200)
    return content.getvalue()


def _finish(axes: Any, label: str, values: Sequence[float]) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    # Damage grows faster than sparsity: high targets would press the low ones to the floor.
    if min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("realised sparsity", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _error(estimate: Estimate) -> float:
    return estimate.standard_error or 0.0
