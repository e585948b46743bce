"""Choosing a token on the device: what top-k and top-p leave, and how the draws fall.

On a CUDA device, or in Triton's interpreter (see `../inference/test_stream_interpreted.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.inference.sampling import Sampling, candidates

pytestmark = pytest.mark.gpu


def _launch(
    kernel: Any, grid: tuple[int, ...], num_warps: int, *args: Any, **constants: Any
) -> None:
    kernel[grid](*args, **constants, PDL=False, num_warps=num_warps)


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


def _left(chooser: Any, levels: int) -> list[int]:
    """The tokens that the selections left, by their last level's bins."""
    prefix, rest = chooser.state[levels - 1].tolist()
    amounts = chooser.bins[levels - 1].cpu()
    reached = amounts.flip(0).cumsum(0).flip(0) >= rest
    cut = prefix * 256 + int(reached.sum()) - 1
    bits = chooser.logits.cpu().view(torch.int32).long() & 0xFFFFFFFF
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
    if any(choice):
        assert _left(chooser, 4 * sum(choice)) == expected
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
    _choose(chooser, chooser.set(1.0, 2, 1.0, 0))
    assert _left(chooser, 4) == [1, 2, 3, 5]
    _choose(chooser, chooser.set(1.0, 0, 0.85, 0))  # 5 alone has 0.70, one 3 more 0.80
    assert _left(chooser, 4) == [1, 2, 3, 5]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40])
def test_a_tiny_temperature_is_greedy(temperature: float, device: str) -> None:
    logits = _logits(300, 3.0, device)
    chooser = _chooser(logits)
    for top_k, top_p in ((0, 1.0), (9, 1.0), (0, 0.9), (9, 0.9)):
        choice = chooser.set(temperature, top_k, top_p, 1)
        assert _choose(chooser, choice) == int(logits.argmax())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreted
def test_strange_logits_still_give_a_token(device: str) -> None:
    ruled_out = torch.full((40,), -torch.inf, device=device)
    ruled_out[[3, 17]] = torch.tensor([1.0, 2.0], device=device)
    broken = torch.full((40,), torch.nan, device=device)
    for top_k, top_p in ((0, 1.0), (9, 1.0), (0, 0.9)):
        chooser = _chooser(ruled_out)
        assert _choose(chooser, chooser.set(1.0, top_k, top_p, 2)) in (3, 17)
        chooser = _chooser(broken)
        assert 0 <= _choose(chooser, chooser.set(1.0, top_k, top_p, 2)) < 40


def test_advancing_notes_token_position_and_counts(device: str) -> None:
    logits = _logits(300, 3.0, device)
    chooser = _chooser(logits)
    choice = chooser.set(0.0, 0, 1.0, 0)
    for position in (4, 5):
        chooser.kept.fill_(position)
        chooser.position.fill_(position)
        assert _choose(chooser, choice) == chooser.history[position] == logits.argmax()
        assert chooser.position.item() == position + 1
    assert chooser.kept_before[:, 2, 6].tolist() == [4, 5]
