"""Spreads, and the order in which variants take turns."""

from __future__ import annotations

import pytest

from teal_cli.benchmark.timing import Decoding, Run, alternate, speedup, spread
from teal_cli.progress import Silent


@pytest.mark.parametrize(
    ("values", "low", "median", "high"),
    [([3.0], 3, 3, 3), ([2.0, 1.0], 1.2, 1.5, 1.8), ([9.0, 0, 5, 1, 2, 4], 1, 3, 5)],
    ids=["one", "two", "six"],
)
def test_a_spread_is_interpolated_between_neighbours(
    values: list[float], low: float, median: float, high: float
) -> None:
    found = spread(values)
    assert (found.low, found.median, found.high) == pytest.approx((low, median, high))


def test_speedup_pairs_the_runs_of_a_repeat() -> None:
    # The machine slows down to a third half-way: the pairs' ratios do not notice.
    slow = [Run(0, seconds) for seconds in (2.0, 2.0, 6.0, 6.0)]
    fast = [Run(0, seconds) for seconds in (1.0, 1.0, 3.0, 3.0)]
    found = speedup(fast, slow)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)


class Recorder:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def warm_up(self) -> None:
        self._log.append(f"warm {self._name}")

    def run(self) -> Run:
        self._log.append(self._name)
        return Run(0.0, len(self._log))


def test_variants_take_turns_and_each_begins_a_repeat() -> None:
    log: list[str] = []
    decodings: dict[str, Decoding] = {name: Recorder(name, log) for name in "abc"}
    runs = alternate(decodings, 4, Silent())
    assert log[:3] == ["warm a", "warm b", "warm c"]
    assert "".join(log[3:]) == "abc" + "bca" + "cab" + "abc"
    assert [len(runs[name]) for name in "abc"] == [4, 4, 4]


def test_what_is_measured_beside_the_runs_meets_every_repeat() -> None:
    log: list[str] = []
    alternate({"a": Recorder("a", log)}, 3, Silent(), beside=lambda: log.append("memory"))
    assert log[1:] == ["memory", "a"] * 3
