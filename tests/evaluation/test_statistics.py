"""Standard errors against closed forms and against resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from teal_cli.evaluation import statistics


def test_mean_is_the_sample_mean_with_its_standard_error() -> None:
    estimate = statistics.mean([1.0, 2.0, 4.0, 9.0])
    assert estimate.value == 4.0
    assert estimate.standard_error == pytest.approx(math.sqrt(38 / 3) / 2)


def test_one_window_has_no_standard_error() -> None:
    assert statistics.mean([3.0]).standard_error is None
    assert statistics.perplexity([3.0]) == statistics.Estimate(math.exp(3.0), None)
    assert statistics.perplexity_gap([3.0], [2.0]).standard_error is None


def test_perplexity_error_is_that_of_resampled_windows() -> None:
    rng = np.random.default_rng(0)
    nll = rng.normal(3.0, 0.2, 40)
    resampled = np.exp(rng.choice(nll, (20000, len(nll))).mean(1)).std()
    estimate = statistics.perplexity(nll.tolist())
    assert estimate.value == pytest.approx(math.exp(nll.mean()))
    assert estimate.standard_error == pytest.approx(resampled, rel=0.05)


def test_gap_is_paired() -> None:
    rng = np.random.default_rng(1)
    dense = rng.normal(3.0, 0.5, 60)
    sparse = dense + rng.normal(0.1, 0.02, 60)
    picks = rng.integers(0, 60, (20000, 60))
    resampled = np.exp(sparse[picks].mean(1)) - np.exp(dense[picks].mean(1))
    gap = statistics.perplexity_gap(sparse.tolist(), dense.tolist())
    assert gap.value == pytest.approx(math.exp(sparse.mean()) - math.exp(dense.mean()))
    assert gap.standard_error == pytest.approx(resampled.std(), rel=0.05)
    alone = statistics.perplexity(sparse.tolist()).standard_error
    assert alone is not None
    assert gap.standard_error is not None
    assert gap.standard_error < alone / 4


def test_the_same_model_has_no_gap() -> None:
    assert statistics.perplexity_gap([2.0, 3.0], [2.0, 3.0]) == statistics.Estimate(0.0, 0.0)


def test_a_hopeless_model_is_infinitely_perplexed() -> None:
    assert statistics.perplexity([800.0]).value == math.inf


def test_difference_is_paired_and_signed() -> None:
    estimate = statistics.difference([2.0, 3.0, 5.0], [1.0, 2.5, 3.0])
    assert estimate.value == pytest.approx(3.5 / 3)
    assert estimate.standard_error == pytest.approx(np.std([1.0, 0.5, 2.0], ddof=1) / math.sqrt(3))


def test_flat_has_no_infinity() -> None:
    assert statistics.flat("x", statistics.Estimate(math.inf, math.inf)) == {
        "x": None,
        "x_standard_error": None,
    }
    assert statistics.flat("x", statistics.Estimate(1.0, 0.5))["x_standard_error"] == 0.5
