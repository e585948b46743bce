"""Sampling against closed forms, and its draws against their own distribution."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.sampling import Sampler, Sampling, candidates, penalised

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
        pytest.param(Sampling(1.0, top_k=-1), [0.1, 0.4, 0.05, 0.25, 0.2], id="top-k of all"),
        pytest.param(Sampling(1.0, top_p=1e-50), [0, 1, 0, 0, 0], id="tiny top-p"),
        pytest.param(
            Sampling(1.0, top_p=1 - 1e-16), [0.1, 0.4, 0.05, 0.25, 0.2], id="top-p near 1"
        ),
        # 0.25 and 0.2 are half of 0.4 or more, 0.1 is not.
        pytest.param(
            Sampling(1.0, min_p=0.45), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85], id="min-p"
        ),
        pytest.param(Sampling(1.0, min_p=1.0), [0, 1, 0, 0, 0], id="min-p of 1"),
        pytest.param(Sampling(1.0, min_p=5e-324), [0.1, 0.4, 0.05, 0.25, 0.2], id="least of min-p"),
        pytest.param(Sampling(1e-30), [0, 1, 0, 0, 0], id="tiny temperature"),
        pytest.param(Sampling(1e300), [0.2] * 5, id="huge temperature"),
    ],
)
def test_distribution_is_the_closed_form(sampling: Sampling, expected: list[float]) -> None:
    assert distribution(LOGITS, sampling).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """A tiny model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,  # logits as far apart as a real model's
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 1.7, "top_k": 4},
        {"top_k": 300},
        {"top_k": 100_000},
        {"top_p": 0.6},
        {"top_p": 1e-50},
        {"top_p": 0.999},
        {"temperature": 1.5, "min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"repetition_penalty": 2.0, "temperature": 2.5, "top_k": 60, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 3.0, "top_p": 0.5, "min_p": 0.3},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, Any], oracle: Any) -> None:
    """Token by token, of what its `generate` says it drew from."""
    prompt = torch.tensor([[5, 17, 5, 290, 44]])
    torch.manual_seed(0)
    out = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=True,
        pad_token_id=0,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **{"top_k": 0, **settings},
    )
    sampling = Sampling(**{"temperature": 1.0, **settings})
    for i, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        tokens = out.sequences[0, : 5 + i].tolist()
        actual = penalised(logits[0], tokens, sampling.repetition_penalty)
        probabilities = distribution(actual, sampling)
        assert torch.equal(probabilities > 0, scores[0] > -math.inf)
        expected = scores[0].double().softmax(-1)
        torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.8, 0.5])
def test_greedy_tokens_are_those_of_transformers(penalty: float, oracle: Any) -> None:
    tokens = [5, 17, 5, 290, 44]
    prompt = torch.tensor([tokens])
    expected = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=penalty,
    )[0].tolist()
    for sampling in (Sampling(0.0), Sampling(1e-50), Sampling(1.0, top_k=1)):
        sampler = Sampler(replace(sampling, repetition_penalty=penalty))
        tokens = [5, 17, 5, 290, 44]
        with torch.inference_mode():
            for _ in range(12):
                tokens.append(sampler.sample(oracle(torch.tensor([tokens])).logits[0, -1], tokens))
        assert tokens == expected


def test_a_penalty_leaves_the_logits_that_it_was_given() -> None:
    before = LOGITS.clone()
    assert Sampler(Sampling(repetition_penalty=9.0)).sample(LOGITS, [1, 1, 3]) == 4
    assert torch.equal(LOGITS, before)
    assert Sampler(Sampling(repetition_penalty=9.0)).sample(LOGITS) == 1


@pytest.mark.parametrize("penalty", [5e-324, 1e-50, 1e50, 1.7e308])
@pytest.mark.parametrize("temperature", [0.0, 1e-29, 1.0, 1.7e308])
def test_no_penalty_or_temperature_breaks_the_logits(penalty: float, temperature: float) -> None:
    sampler = Sampler(Sampling(temperature, repetition_penalty=penalty))
    for logits in (LOGITS, -LOGITS):
        assert 0 <= sampler.sample(logits, [0, 1]) < 5


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-50, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature: float, options: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(temperature, **options))
    assert {sampler.sample(LOGITS) for _ in range(20)} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_logits_that_are_not_finite_are_an_error(temperature: float, penalty: float) -> None:
    sampler = Sampler(Sampling(temperature, top_p=0.9, repetition_penalty=penalty))
    for values in (
        [math.nan] * 5,
        [1.0, math.nan, 3.0],
        [1.0, math.inf, 3.0],
        [-math.inf] * 4,
    ):
        with pytest.raises(TealError, match="logits are not finite") as error:
            sampler.sample(torch.tensor(values), [0])
        assert error.value.hint is not None
        assert "bfloat16" in error.value.hint
    assert sampler.sample(torch.tensor([-math.inf, 2.0, -math.inf]), [0]) == 1  # ruled out


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
        {"top_k": -2},
        {"top_k": 2**31},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": math.nan},
    ],
    ids=str,
)
def test_out_of_range_is_a_usage_error(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)  # type: ignore[arg-type]
