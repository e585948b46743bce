"""Choosing a token on the device: what top-k and top-p leave, and how the draws fall.

On a CUDA device, or in Triton's interpreter (see `../inference/test_stream_interpreted.py`).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.inference.sampling import Sampler, Sampling, candidates, penalised

pytestmark = pytest.mark.gpu


def _launch(kernel: Any, grid: tuple[int, ...], num_warps: int, **arguments: Any) -> None:
    kernel[grid](**arguments, PDL=False, num_warps=num_warps)


def _chooser(logits: Tensor, length: int = 8) -> Any:
    from teal_kernels.gpu.sample import Chooser

    def counter(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=logits.device)

    chooser = Chooser(_launch, logits, counter(1), counter(1), counter(3, 7), length)
    for buffer in (chooser.peaks, chooser.best):
        buffer.fill_(torch.nan)
    for buffer in (chooser.bins, chooser.state, chooser.index):
        buffer.fill_(-99)  # whatever is read is to be written first
    return chooser


def _choose(chooser: Any, choice: Any) -> int:
    chooser.launch(choice)
    return int(chooser.token)


def _draws(chooser: Any, choice: Any, count: int) -> Tensor:
    """Tokens of the first `count` positions, all from the same logits."""
    chooser.position.zero_()
    chooser.select(choice)
    for _ in range(count):
        chooser.draw(choice)
    assert int(chooser.position) == count
    return chooser.history[:count].long()


def _left(chooser: Any, choice: Any) -> list[int]:
    """The tokens that the selections left, by their last level's bins."""
    levels = 4 * choice.selections
    prefix, rest = chooser.state[levels - 1].tolist()
    amounts = chooser.bins[levels - 1].cpu()
    reached = amounts.flip(0).cumsum(0).flip(0) >= rest
    cut = prefix * 256 + int(reached.sum()) - 1
    bits = chooser._scores(choice).cpu().view(torch.int32).long() & 0xFFFFFFFF
    keys = torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits | 0x80000000)
    return (keys >= cut).nonzero().flatten().tolist()


def _logits(vocab: int, spread: float, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return (torch.randn(vocab, generator=generator) * spread - 1).to(device)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (20, 0.8), (0, 0.9), (0, 0.3), (400, 0.999)], ids=str
)
@pytest.mark.parametrize("vocab", [5, 257, 700])
@pytest.mark.parametrize("spread", [0.1, 4.0], ids=["flat", "peaked"])
def test_leaves_what_the_host_leaves(
    vocab: int, spread: float, top_k: int, top_p: float, device: str
) -> None:
    logits = _logits(vocab, spread, device)
    chooser = _chooser(logits)
    choice = chooser.set(0.7, top_k, top_p, 3)
    token = _choose(chooser, choice)
    _, tokens = candidates(logits, Sampling(0.7, top_k, top_p))
    expected = sorted(tokens.tolist())
    if choice.selections:
        assert _left(chooser, choice) == expected
    assert token in expected


def test_only_what_is_left_is_drawn_and_all_of_it(device: str) -> None:
    logits = _logits(300, 3.0, device)
    chooser = _chooser(logits, 40)
    choice = chooser.set(1e6, 3, 1.0, 3)  # so hot that each of the three is as likely
    drawn = set(_draws(chooser, choice, 40).tolist())
    assert drawn == set(logits.topk(3).indices.tolist())  # missed once in 10^6 seeds


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"temperature": 0.5}, id="temperature"),
        pytest.param({"top_k": 3}, id="top-k"),
        pytest.param({"top_p": 0.7}, id="top-p"),
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any], device: str) -> None:
    logits = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], device=device).log() + 3.0
    sampling = Sampling(**{"temperature": 1.0, **options})
    draws = 100
    chooser = _chooser(logits, draws)
    choice = chooser.set(sampling.temperature, sampling.top_k, sampling.top_p, 11)
    counts = torch.bincount(_draws(chooser, choice, draws), minlength=5).double()
    probabilities, tokens = candidates(logits.cpu(), sampling)
    expected = torch.zeros(5).index_add_(0, tokens, probabilities).double() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 18.5  # 0.1 % of samples of 4 degrees of freedom lie beyond


def test_draws_among_a_whole_vocabulary(device: str) -> None:
    """Each program's best and the best of those: equal logits make every token as likely."""
    vocab, draws = 600, 60
    chooser = _chooser(torch.zeros(vocab, device=device), draws)
    choice = chooser.set(1.0, 0, 1.0, 5)
    tokens = _draws(chooser, choice, draws)
    quarters = torch.histc(tokens.float(), 4, 0, vocab)
    assert ((quarters - draws / 4) ** 2 / (draws / 4)).sum() < 16.3  # 0.1 %, 3 degrees
    assert len(set(tokens.tolist())) > 0.8 * draws


def test_noise_is_keyed_by_seed_and_position(device: str) -> None:
    chooser = _chooser(torch.zeros(50, device=device), 24)

    def draw(seed: int) -> list[int]:
        return _draws(chooser, chooser.set(1.0, 0, 1.0, seed), 24).tolist()

    first = draw(7)
    assert draw(7) == first
    others = [draw(8), draw(7 + 2**32), draw(2**63 - 1)]
    assert all(other != first for other in others)
    # A neighbouring seed is not the same noise a position on.
    assert others[0][:-1] != first[1:]


@pytest.mark.parametrize("options", [(0.0, 7, 0.3), (0.8, 1, 0.9)], ids=["greedy", "top-k of one"])
def test_greedy_takes_the_first_of_the_likeliest(
    options: tuple[float, int, float], device: str
) -> None:
    logits = _logits(600, 1.0, device)
    logits[[31, 300, 590]] = 9.0
    chooser = _chooser(logits)
    choice = chooser.set(*options, 3)
    assert not any(choice)
    assert _choose(chooser, choice) == 31


def test_ties_at_the_cut_stay(device: str) -> None:
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, -2.0, 3.0, 0.0, -0.5], device=device)
    chooser = _chooser(logits)
    for top_k, top_p in ((2, 1.0), (0, 0.85)):  # 5 alone has 0.70, one 3 more 0.80
        choice = chooser.set(1.0, top_k, top_p, 0)
        _choose(chooser, choice)
        assert _left(chooser, choice) == [1, 2, 3, 5]
    assert candidates(logits, Sampling(1.0, 2))[1].tolist() == [1, 2, 3, 5]


def test_min_p_leaves_what_the_host_leaves(device: str) -> None:
    logits = _logits(300, 1.0, device)
    for options in ({}, {"top_k": 3}, {"top_p": 0.02}):
        sampling = Sampling(3.0, min_p=0.6, **options)  # type: ignore[arg-type]
        chooser = _chooser(logits, 60)
        choice = chooser.set(3.0, sampling.top_k, sampling.top_p, 5, 0.6)
        assert choice.min_p
        expected = set(candidates(logits, sampling)[1].tolist())
        # Each has a fifth of the probability or more: one of 10^5 seeds misses one of 4.
        assert 1 < len(expected) <= 4
        assert set(_draws(chooser, choice, 60).tolist()) == expected


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_min_p_cuts_at_its_share_exactly(temperature: float, device: str) -> None:
    edge = torch.tensor(temperature * math.log(0.5))
    below = torch.nextafter(edge, torch.tensor(-torch.inf))
    logits = torch.stack([edge, torch.tensor(0.0), below, edge]).to(device)
    chooser = _chooser(logits, 60)
    drawn = _draws(chooser, chooser.set(temperature, 0, 1.0, 5, 0.5), 60)
    assert set(drawn.tolist()) == {0, 1, 3}
    assert candidates(logits, Sampling(temperature, min_p=0.5))[1].tolist() == [0, 1, 3]


def test_a_penalty_counts_what_was_there_and_what_is_chosen(device: str) -> None:
    """Greedily on logits that stay: against transformers' own, token by token."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = _logits(300, 1.5, device)
    logits[11] = 0.0
    largest = logits.topk(6).indices.tolist()
    tokens = [largest[1], 11, largest[1], int(logits.argmin())]
    processor = RepetitionPenaltyLogitsProcessor(2.5)
    chooser = _chooser(logits, 24)
    choice = chooser.set(0.0, 0, 1.0, 3, repetition_penalty=2.5, tokens=tokens)
    for position in range(12):
        expected = processor(torch.tensor([tokens]), logits.cpu()[None])[0]
        assert _choose(chooser, choice) == chooser.history[position] == expected.argmax()
        torch.testing.assert_close(chooser.penalised.cpu(), expected, rtol=0, atol=0)
        torch.testing.assert_close(penalised(logits.cpu(), tokens, 2.5), expected, rtol=0, atol=0)
        tokens.append(int(chooser.history[position]))
    assert len(set(tokens[4:])) > 3
    # A beginning forgets the tokens of another, and 1 is no penalty.
    choice = chooser.set(0.0, 0, 1.0, 3, repetition_penalty=2.5, tokens=[2])
    chooser.launch(choice)
    seen = torch.zeros(300, dtype=torch.bool).index_fill(0, torch.tensor([2, largest[0]]), True)
    assert torch.equal(chooser.seen.cpu().bool(), seen)
    assert not any(chooser.set(0.0, 0, 1.0, 3, repetition_penalty=1.0, tokens=tokens))


def test_what_is_cut_is_cut_of_penalised_logits(device: str) -> None:
    logits = _logits(300, 2.0, device)
    tokens = logits.topk(3).indices.tolist()
    for top_k, top_p, min_p in ((5, 1.0, 0.0), (0, 0.7, 0.0), (9, 0.9, 0.0), (0, 1.0, 0.3)):
        sampling = Sampling(0.9, top_k, top_p, min_p, 3.0)
        chooser = _chooser(logits)
        choice = chooser.set(0.9, top_k, top_p, 5, min_p, 3.0, tokens)
        token = _choose(chooser, choice)
        left = candidates(penalised(logits, tokens, 3.0), sampling)[1].tolist()
        assert token in left
        assert sorted(left) != sorted(candidates(logits, sampling)[1].tolist())
        if choice.selections:
            assert _left(chooser, choice) == sorted(left)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e-50},
        {"temperature": 5e-324, "top_p": 5e-324, "min_p": 5e-324},
        {"temperature": 1e300, "top_k": 4, "min_p": 0.5},
        {"top_k": -1, "top_p": 1e-50},
        {"top_k": 2**31 - 1, "top_p": 1 - 1e-16},
        {"min_p": 1.0},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "temperature": 1e-29, "min_p": 1e-300},
    ],
    ids=str,
)
def test_extremes_are_the_hosts(settings: dict[str, Any], device: str) -> None:
    logits, tokens = _logits(300, 3.0, device), [4, 9, 250]
    sampling = Sampling(**{"temperature": 0.8, **settings})
    chooser = _chooser(logits)
    choice = chooser.set(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        7,
        sampling.min_p,
        sampling.repetition_penalty,
        tokens,
    )
    token = _choose(chooser, choice)
    scores = penalised(logits, tokens, sampling.repetition_penalty)
    if sampling.greedy:
        assert token == Sampler(sampling).sample(logits, tokens) == scores.argmax()
    else:
        assert token in candidates(scores, sampling)[1]
        assert Sampler(sampling).sample(logits, tokens) in candidates(scores, sampling)[1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float, device: str) -> None:
    logits = _logits(300, 3.0, device)
    chooser = _chooser(logits)
    for top_k, top_p in ((0, 1.0), (9, 1.0), (0, 0.9), (9, 0.9)):
        choice = chooser.set(temperature, top_k, top_p, 1)
        assert _choose(chooser, choice) == int(logits.argmax())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, interpreted
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 9, 1.0, 0.1), (1.0, 0, 0.9, 0.0)],
    ids=["greedy", "plain", "top-k and min-p", "top-p"],
)
def test_logits_that_are_not_finite_give_no_token(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, device: str
) -> None:
    vocab = 300  # of two programs

    def history(logits: Tensor) -> int:
        chooser = _chooser(logits.to(device))
        choice = chooser.set(temperature, top_k, top_p, 2, min_p, penalty, [3, 4])
        assert 0 <= _choose(chooser, choice) < vocab  # what runs ahead stays in the vocabulary
        return int(chooser.history[0])

    ruled_out = torch.full((vocab,), -torch.inf)
    assert history(ruled_out) == -1
    ruled_out[[3, 277]] = torch.tensor([1.0, 2.0])
    assert history(ruled_out) in (3, 277)
    broken = _logits(vocab, 1.0, "cpu")
    assert history(broken) >= 0
    for index in (3, 200, 299):
        for value in (torch.nan, torch.inf):
            some = broken.clone()
            some[index] = value
            assert history(some) == -1
    assert history(torch.full((vocab,), torch.nan)) == -1


def test_advancing_notes_token_position_and_counts(device: str) -> None:
    logits = _logits(300, 3.0, device)
    chooser = _chooser(logits)
    choice = chooser.set(0.0, 0, 1.0, 0)
    for position in (4, 5):
        chooser.kept.fill_(position)
        chooser.position.fill_(position)
        assert _choose(chooser, choice) == chooser.history[position] == logits.argmax()
        assert chooser.position.item() == position + 1
    assert [int(chooser.counts_before(position)[2, 6]) for position in (5, 6)] == [4, 5]
