"""A profile's summary as a figure."""

from __future__ import annotations

import io
from typing import Any

from teal_cli.model.sites import PROJECTIONS
from teal_cli.sparsity.summary import SiteHistogram, Summary

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#D55E00", "#009E73", "#CC79A7")
_DASHES = ("-", "--", ":")
_NUMBERED = 48  # layers up to which a cell's number can be read


def draw(summary: Summary, suffix: str) -> bytes:
    """The heat map of the sparsities, and the histograms beside it if there are any.

    Args:
        summary: what to draw.
        suffix: the format, .png, .pdf or .svg.
    """
    from matplotlib.figure import Figure

    layers = summary.profile.shape.num_hidden_layers
    count = len(summary.histograms)
    height = max(3.2, 1.2 + 0.17 * min(layers, _NUMBERED), 0.6 + 1.75 * count)
    figure = Figure(figsize=(4.4 + (4.2 if count else 0), height), layout="constrained")
    if count:
        left, right = figure.subfigures(1, 2, width_ratios=(4.4, 4.2), squeeze=False)[0]
        panels = right.subplots(count, 1, squeeze=False)[:, 0]
        for axes, histogram in zip(panels, summary.histograms, strict=True):
            _draw_histogram(axes, histogram)
        panels[-1].set_xlabel("abs(x)", fontsize=8)
        _draw_heat_map(left, summary)
    else:
        _draw_heat_map(figure, summary)
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), dpi=200)
    return content.getvalue()


def _draw_heat_map(figure: Any, summary: Summary) -> None:
    axes = figure.subplots()
    table = summary.sparsity.numpy()
    image = axes.imshow(table, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_xticks(range(len(PROJECTIONS)), PROJECTIONS, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel("layer", fontsize=8)
    if len(table) <= _NUMBERED:
        middle = (table.min() + table.max()) / 2
        for layer, row in enumerate(table):
            for column, value in enumerate(row):
                colour = "black" if value > middle else "white"
                at = {"ha": "center", "va": "center", "fontsize": 6}
                axes.text(column, layer, f"{value:.2f}", color=colour, **at)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("share of the dense inputs skipped", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title(
        f"{summary.profile.model}\n{summary.method} at sparsity {summary.target:g}",
        fontsize=8,
        loc="left",
    )


def _draw_histogram(axes: Any, histogram: SiteHistogram) -> None:
    axes.stairs(histogram.shares, histogram.edges, fill=True, color="#56B4E9")
    for place, (name, level) in enumerate(histogram.thresholds.items()):
        axes.axvline(
            level,
            color=_COLOURS[place],
            linestyle=_DASHES[place],
            linewidth=1.2,
            label=f"{name}: {level:.3g} skips {histogram.below[name]:.0%}",
        )
    axes.set_yscale("log")
    axes.set_xlim(0, histogram.edges[-1])
    axes.set_ylabel("share", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"layer {histogram.layer}, {histogram.site} "
        f"({histogram.beyond:.2%} beyond, up to {histogram.largest:.3g})",
        fontsize=8,
        loc="left",
    )
