"""Repeated runs, alternated between the variants, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy

from teal_cli.inference.guesses import DraftCounts
from teal_cli.progress import Reporter


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt answered once."""

    time_to_first_token_s: float
    time_per_token_s: float  # of the tokens after the first
    realised_sparsity: float | None = None  # None when dense
    draft: DraftCounts | None = None  # None where nothing guesses tokens


class Decoding(Protocol):
    """One way of decoding the same prompt."""

    def warm_up(self) -> None:
        """Compile what is compiled at first use."""

    def run(self) -> Run:
        """Answer the prompt from the beginning, and time it."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of repeated measurements, between their 20th and 80th percentiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile of at least one value."""
    low, median, high = numpy.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Spread(median, low, high)


def alternate(
    decodings: Mapping[str, Decoding],
    repeats: int,
    reporter: Reporter,
    beside: Callable[[], object] = lambda: None,
) -> dict[str, list[Run]]:
    """Run every decoding `repeats` times, in turns.

    Every repeat runs all of them, each time beginning with another, so that what the machine
    does besides meets all of them alike.

    Args:
        decodings: by label.
        repeats: runs of each.
        reporter: follows them.
        beside: is called at the beginning of every repeat, for what is measured beside them.
    """
    names = list(decodings)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    with reporter.task("warming up", total=len(names), unit="runs") as task:
        for decoding in decodings.values():
            decoding.warm_up()
            task.advance()
    with reporter.task("measuring", total=len(names) * repeats, unit="runs") as task:
        for repeat in range(repeats):
            beside()
            first = repeat % len(names)
            for name in names[first:] + names[:first]:
                runs[name].append(decodings[name].run())
                task.advance()
    return runs


def speedup(runs: Sequence[Run], reference: Sequence[Run]) -> Spread:
    """How much faster a token comes than in the reference, from the pairs of one repeat each."""
    pairs = zip(runs, reference, strict=True)
    return spread([base.time_per_token_s / run.time_per_token_s for run, base in pairs])
