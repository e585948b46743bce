"""Sampling against closed forms, and its draws against their own distribution."""

from __future__ import annotations

import math

import pytest
import torch

from teal_cli.errors import UsageError
from teal_cli.inference.sampling import Sampler, Sampling, candidates

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
LOGITS = PROBABILITIES.log().float() + 3.0  # any shift gives the same distribution


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    probabilities, tokens = candidates(logits, sampling)
    return torch.zeros(logits.numel(), dtype=torch.float64).index_add_(
        0, tokens, probabilities.double()
    )


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        pytest.param(Sampling(1.0), [0.1, 0.4, 0.05, 0.25, 0.2], id="plain"),
        pytest.param(Sampling(1.0, top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], id="top-k"),
        pytest.param(Sampling(1.0, top_k=99), [0.1, 0.4, 0.05, 0.25, 0.2], id="top-k beyond"),
        # 0.4 + 0.25 = 0.65 falls short of 0.7, so the third token is in.
        pytest.param(
            Sampling(1.0, top_p=0.7), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85], id="top-p"
        ),
        pytest.param(Sampling(1.0, top_p=0.01), [0, 1, 0, 0, 0], id="top-p keeps one"),
        # After top-k the two carry 0.615 and 0.385: 0.6 needs the first only.
        pytest.param(Sampling(1.0, top_k=2, top_p=0.6), [0, 1, 0, 0, 0], id="both"),
        pytest.param(
            Sampling(0.5),
            [p * p / 0.275 for p in (0.1, 0.4, 0.05, 0.25, 0.2)],
            id="temperature",
        ),
        pytest.param(Sampling(1e-30), [0, 1, 0, 0, 0], id="tiny temperature"),
    ],
)
def test_distribution_is_the_closed_form(sampling: Sampling, expected: list[float]) -> None:
    assert distribution(LOGITS, sampling).tolist() == pytest.approx(expected, abs=1e-6)


def test_temperature_comes_before_top_p() -> None:
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()  # 0.036, 0.582, 0.009, 0.227, 0.145
    kept = {1, 3}
    expected = [float(squared[i]) / float(squared[1] + squared[3]) * (i in kept) for i in range(5)]
    assert distribution(LOGITS, Sampling(0.5, top_p=0.8)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99], ids=["narrow", "usual", "wide"])
def test_top_p_on_a_large_flat_vocabulary_equals_a_full_sort(top_p: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.5
    full = torch.softmax(logits.double(), -1)
    ordered, order = full.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) - ordered < top_p).sum())]
    actual = distribution(logits, Sampling(1.0, top_p=top_p))
    expected = torch.zeros_like(full).index_copy_(0, kept, full[kept] / full[kept].sum())
    # float32 sums may place the edge one or two tokens off; each weighs about 5e-5.
    assert (actual - expected).abs().sum() < 5e-4


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.7, seed=2),
        Sampling(1.0, top_k=3, seed=3),
        Sampling(1.3, top_p=0.8, seed=4),
    ],
    ids=["plain", "temperature", "top-k", "top-p"],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    draws = 4000
    sampler = Sampler(sampling)
    counts = torch.zeros(5, dtype=torch.float64)
    for _ in range(draws):
        counts[sampler.sample(LOGITS)] += 1
    expected = distribution(LOGITS, sampling) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 0.1 % of samples of 4 degrees of freedom lie beyond


def test_greedy_takes_the_likeliest_whatever_the_rest_says() -> None:
    sampler = Sampler(Sampling(0.0, top_k=3, top_p=0.5))
    assert {sampler.sample(LOGITS.half()) for _ in range(5)} == {1}


def test_a_seed_repeats_and_another_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
    assert draw(-1) == draw(-1)  # any integer is a seed
    assert draw(2**80) == draw(2**80)


def test_seeds_for_the_device_repeat_too() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.draw_seed() for _ in range(3)]

    assert draw(7) == draw(7)
    assert len({*draw(7), *draw(8)}) == 6
    assert all(0 <= seed < 2**63 for seed in draw(9))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_out_of_range_is_a_usage_error(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)  # type: ignore[arg-type]
