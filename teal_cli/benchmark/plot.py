"""A benchmark's result as a figure."""

from __future__ import annotations

import io

from teal_cli.benchmark.report import heading
from teal_cli.benchmark.result import BenchResult, Row

# Okabe and Ito's palette, which colour-blind readers tell apart, and which prints well in grey.
_COLOURS = {"dense": "#56B4E9", "sparse": "#0072B2", "draft": "#009E73", "baseline": "#BBBBBB"}


def draw(result: BenchResult, suffix: str) -> bytes:
    """Tokens a second of every row with its spread, against what the bandwidth allows.

    Args:
        result: what to draw.
        suffix: the format, .png, .pdf or .svg.
    """
    from matplotlib.figure import Figure

    order = {"baseline": 0, "dense": 1, "sparse": 2, "draft": 3}
    rows = sorted(result.rows, key=lambda row: order[row.kind])
    width = max(4.2, 1.6 + 0.85 * len(rows))
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    axes = figure.add_subplot()
    ceilings = [result.bandwidth.bytes_per_s / row.bytes_per_token for row in rows]
    for place, (row, ceiling) in enumerate(zip(rows, ceilings, strict=True)):
        speed = row.tokens_per_s
        axes.bar(place, speed.median, width=0.66, color=_COLOURS[row.kind], zorder=2)
        whisker = [[speed.median - speed.low], [speed.high - speed.median]]
        axes.errorbar(
            place, speed.median, yerr=whisker, color="black", capsize=3, linewidth=1, zorder=4
        )
        axes.hlines(ceiling, place - 0.33, place + 0.33, colors="#D55E00", linewidth=1.4, zorder=3)
        above = axes.annotate(
            f"{speed.median:.{0 if speed.median >= 100 else 1}f}",
            (place, speed.high),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            zorder=5,
        )
        above.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})
        if (gain := row.speedup.get("dense")) is not None:
            axes.annotate(
                f"{gain.median:.2f}×",
                (place, 0),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                fontweight="bold",
                color="white" if row.kind in ("sparse", "draft") else "black",
                zorder=5,
            )
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_xlabel("bold: speed-up over teal dense", fontsize=8)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(0, 1.08 * max(*ceilings, *(row.tokens_per_s.high for row in rows)))
    axes.hlines([], 0, 0, colors="#D55E00", label=_ceiling_label(result))
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(heading(result).replace(": ", "\n", 1), fontsize=8, loc="left")
    content = io.BytesIO()
    figure.savefig(content, format=suffix.removeprefix("."), dpi=200)
    return content.getvalue()


def _label(row: Row) -> str:
    if row.realised_sparsity is not None:
        return f"sparse\n{row.realised_sparsity:.0%}"
    if row.kind == "draft":
        return f"{row.label}\nguesses"
    return f"teal dense\n{row.dtype}" if row.kind == "dense" else f"{row.label}\n{row.dtype}"


def _ceiling_label(result: BenchResult) -> str:
    return f"ceiling at {result.bandwidth.bytes_per_s / 1e9:.0f} GB/s"
