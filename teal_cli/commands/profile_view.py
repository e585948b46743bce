"""A profile in the terminal: a heat map of its sparsities, and histograms of its activations.

Colours are left out where stdout is no terminal or wants none; the figures are always there.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

from teal_cli import console
from teal_cli.model.sites import PROJECTIONS
from teal_cli.printable import printable

if TYPE_CHECKING:
    from rich.text import Text

    from teal_cli.sparsity.summary import SiteHistogram, Summary

# Anchors of the cividis map (Nuñez, Anderton and Renslow, 2018), made to look alike to readers
# with and without colour blindness, and to rise evenly in lightness.
_RAMP = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "fee838")
_SKIPPED, _PARTLY, _KEPT = "bright_black", "#56b4e9", "#0072b2"
_CELL, _LABEL = 5, 4
_ONE_PANEL = 60  # layers; more stand in two panels, side by side in 80 columns
_HEIGHT = 8
_BLOCKS = " ▁▂▃▄▅▆▇█"
_AXIS = 10  # columns left of a histogram


def print_summary(summary: Summary) -> None:
    """Print the heat map, or the histograms if there are any, and what they come from."""
    profile = summary.profile
    _print(
        [_text(f"{profile.model}: method {summary.method} at sparsity {summary.target:g}", "bold")]
    )
    if summary.histograms:
        for histogram in summary.histograms:
            _print([_text(""), *histogram_lines(histogram)])
    else:
        two = profile.shape.num_hidden_layers > _ONE_PANEL and sys.stdout.isatty()
        _print(heat_map(summary.sparsity.tolist(), panels=2 if two else 1))
        print()
        _print_thresholds(summary)
        if summary.vectors is not None:
            print()
            _print_vectors(summary.vectors)
    print()
    _print([_text(f"{name:<10} {value}") for name, value in _origin(summary)])


def heat_map(rows: list[list[float]], *, panels: int = 1) -> list[Text]:
    """Lines that show a [num_hidden_layers, 7] table of shares in percent, a row a layer."""
    flat = [value for row in rows for value in row]
    low, high = min(flat), max(flat)
    names = "".join(name.rjust(_CELL - 1) + " " for name in PROJECTIONS)
    header = " " * _LABEL + names
    length = math.ceil(len(rows) / panels)
    lines = [
        _text("percent of the dense model's inputs skipped, by layer and projection", "dim"),
        _text("  ".join([header] * panels)),
    ]
    for top in range(length):
        line = _text("")
        for layer in range(top, len(rows), length):
            if layer != top:
                line.append("  ")
            line.append(f"{layer:>{_LABEL}}")
            for value in rows[layer]:
                line.append(f"{100 * value:{_CELL - 1}.0f} ", style=_colours(value, low, high))
        lines.append(line)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    cells = "".join(f"{100 * value:{_CELL - 1}.0f} " for value in means)
    lines.append(_text(f"{'mean':>{_LABEL}}{cells}".rstrip(), "dim"))
    return lines


def histogram_lines(histogram: SiteHistogram) -> list[Text]:
    """Lines that show one histogram, its height logarithmic, with the thresholds marked."""
    levels = sorted(histogram.thresholds.values())
    seen = [share for share in histogram.shares if share > 0]
    top, bottom = math.log(max(seen)), math.log(min(seen)) - 0.5
    heights = [
        max(1, round(8 * _HEIGHT * (math.log(share) - bottom) / (top - bottom))) if share > 0 else 0
        for share in histogram.shares
    ]
    lines = [
        _text(
            f"layer {histogram.layer}, {histogram.site}: share of the dense activations by abs(x)"
        ),
    ]
    for row in reversed(range(_HEIGHT)):
        share = math.exp(bottom + (row + 1) / _HEIGHT * (top - bottom))
        label = f"{100 * share:.2g} %" if row % 2 else ""
        line = _text(f"{label:>{_AXIS - 2}} │")
        for height, (left, right) in zip(heights, pairwise(histogram.edges), strict=True):
            middle = (left + right) / 2
            style = _SKIPPED if middle <= levels[0] else _KEPT
            if levels[0] < middle <= levels[-1]:
                style = _PARTLY
            line.append(_BLOCKS[min(max(height - 8 * row, 0), 8)], style=style)
        lines.append(line)
    last = f"{histogram.edges[-1]:.3g}"
    width = len(heights)
    ends = "0" + last.rjust(width - 1)
    lines.append(_text(" " * (_AXIS - 1) + "└" + "─" * width))
    places = {
        name: min(int(level / histogram.edges[-1] * width), width - 1)
        for name, level in histogram.thresholds.items()
    }
    marks = "".join("▲" if column in places.values() else " " for column in range(width))
    names = ""
    for name, column in sorted(places.items(), key=lambda place: place[1]):
        names = names.ljust(column if not names else max(column, len(names) + 1)) + name
    lines += [_text((" " * _AXIS + line).rstrip()) for line in (marks, names, ends)]
    lines += [
        _text(f"{name} at {level:.4g} skips {100 * histogram.below[name]:.1f} % of them")
        for name, level in histogram.thresholds.items()
    ]
    beyond = f"{100 * histogram.beyond:.2g} % lie beyond {last}, the largest at"
    lines.append(_text(f"{beyond} {histogram.largest:.3g}", "dim"))
    return lines


def _print_thresholds(summary: Summary) -> None:
    rows = []
    for column, name in enumerate(PROJECTIONS):
        tables = (summary.sparsity[:, column].tolist(), summary.thresholds[:, column].tolist())
        rows.append(
            [name, *(f"{median(c):.3g} ({min(c):.3g} … {max(c):.3g})" for c in tables)],
        )
    console.print_table(["", "sparsity", "threshold"], rows, title=["median (lowest … highest)"])


def _print_vectors(vectors: dict[str, list[float]]) -> None:
    names = list(vectors)
    rows = [
        [str(layer), *(f"{value:.3g}" for value in sizes)]
        for layer, sizes in enumerate(zip(*vectors.values(), strict=True))
    ]
    title = ["size of the vectors: biases, and changes of norms in their own size"]
    console.print_table(["layer", *names], rows, title=title)


def _origin(summary: Summary) -> list[tuple[str, str]]:
    """Where the profile comes from, as names and values."""
    profile = summary.profile
    known = dict(profile.provenance)
    text = str(known.get("dataset", "unknown"))
    if "dataset_part" in known:
        text += f" ({known['dataset_part']})"
    lines = [("methods", ", ".join(profile.methods)), ("dataset", text)]
    if (found := profile.recovery.get(summary.method)) is not None:
        learnt = ", ".join(f"{target:g}" for target in found.targets[1:])
        lines.append(("vectors", f"at {learnt}, from {found.provenance.get('dataset', 'unknown')}"))
    if "tokens" in known:
        shape = f"{known['samples']} windows of {known['seq_len']}"
        lines.append(("tokens", f"{known['tokens']} in {shape}"))
    if "seed" in known:
        lines.append(("seed", str(known["seed"])))
    if "date" in known:
        lines.append(("made", f"{known['date']} by teal {known.get('teal', 'unknown')}"))
    return lines


def _colours(value: float, low: float, high: float) -> str:
    """A style whose background says where a value lies; black or white on it, for contrast."""
    place = 0.5 if high - low < 1e-6 else (value - low) / (high - low)
    at = min(int(place * (len(_RAMP) - 1)), len(_RAMP) - 2)
    part = place * (len(_RAMP) - 1) - at
    red, green, blue = (
        round(int(_RAMP[at][i : i + 2], 16) * (1 - part) + int(_RAMP[at + 1][i : i + 2], 16) * part)
        for i in (0, 2, 4)
    )
    front = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "#ffffff"
    return f"{front} on #{red:02x}{green:02x}{blue:02x}"


def _text(content: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(content), style=style)


def _print(lines: list[Text]) -> None:
    from rich.console import Console

    out = Console(highlight=False)
    for line in lines:
        out.print(line, soft_wrap=True)
