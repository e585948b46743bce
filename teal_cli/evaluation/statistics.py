"""Means over windows, with the standard errors that windows allow.

The tokens of one window depend on each other, so that a window, not a token, is one observation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error; None where there was only one window."""

    value: float
    standard_error: float | None


def mean(windows: Sequence[float]) -> Estimate:
    """The mean of one value a window."""
    return Estimate(fmean(windows), _error_of_mean(windows))


def perplexity(nll: Sequence[float]) -> Estimate:
    """exp of the mean over windows of the negative log-likelihood, nats a token.

    The standard error is the delta method's: that of the mean times the perplexity.
    """
    value = _exp(fmean(nll))
    error = _error_of_mean(nll)
    return Estimate(value, None if error is None else value * error)


def perplexity_gap(nll: Sequence[float], dense_nll: Sequence[float]) -> Estimate:
    """Perplexity minus the dense model's on the same windows.

    Paired: the standard error is that of the mean of both gradients' difference, so that a
    window which is hard for both models does not count as noise.
    """
    ours, dense = _exp(fmean(nll)), _exp(fmean(dense_nll))
    pairs = zip(nll, dense_nll, strict=True)
    return Estimate(ours - dense, _error_of_mean([ours * a - dense * b for a, b in pairs]))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Mean of what the same windows or documents score here and there, ours minus theirs.

    Paired: what is hard for both does not count as noise.
    """
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])


def flat(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """An estimate as two entries of a document; a value that is no number becomes None."""
    value = estimate.value if estimate is not None and math.isfinite(estimate.value) else None
    error = estimate.standard_error if estimate is not None and value is not None else None
    return {name: value, f"{name}_standard_error": error}


def _error_of_mean(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return stdev(values) / math.sqrt(len(values))


def _exp(nll: float) -> float:
    """exp that ends in infinity: a model can be as wrong as it likes."""
    return math.exp(nll) if nll < 709 else math.inf
