"""How many tokens are guessed: what pays, and never 3 % lost where guesses fail."""

from __future__ import annotations

import random

import pytest

from teal_cli.inference.pace import LENGTHS, Costs, Pace

TOKEN_S = 0.01


def run(
    acceptance: float, *, guess: float, further: float, tokens: int = 600, warm: bool = True
) -> tuple[float, list[int]]:
    """How long so many tokens take, over one by one, and the lengths of the rounds.

    Args:
        acceptance: chance of each guess.
        guess: time of a guess, in tokens' time.
        further: time of each further token that is checked.
        tokens: to be decoded.
        warm: whether all costs are known at first.
    """
    costs = Costs()
    pace, dice, time_s, said, lengths = Pace(costs), random.Random(1), 0.0, 0, []

    def check_s(count: int) -> float:
        return TOKEN_S * (1 + further * (count - 1))

    if warm:
        costs.decoded(TOKEN_S)
        pace.guessed(1, guess * TOKEN_S)
        for length in LENGTHS:
            costs.checked(length + 1, check_s(length + 1))
    while said < tokens:
        length = pace.length(tokens - said)
        lengths.append(length)
        if not length:
            costs.decoded(TOKEN_S)
            time_s, said = time_s + TOKEN_S, said + 1
            continue
        right = next((i for i in range(length) if dice.random() >= acceptance), length)
        seconds = length * guess * TOKEN_S + check_s(length + 1)
        pace.round_ended(length, right, seconds, length * guess * TOKEN_S)
        time_s, said = time_s + seconds, said + right + 1
    return time_s / (said * TOKEN_S), lengths


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("guess", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("further", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3])
def test_guesses_that_fail_cost_under_three_percent(
    acceptance: float, further: float, guess: float, warm: bool
) -> None:
    assert run(acceptance, guess=guess, further=further, warm=warm)[0] < 1.03


def test_what_pays_is_found() -> None:
    """Near the best constant length (Leviathan et al., theorem 3.8), with all costs unknown."""
    for acceptance, guess, further in ((0.95, 0.0, 0.02), (0.85, 0.35, 0.02), (0.75, 0.1, 0.05)):
        best = max(
            sum(acceptance**i for i in range(length + 1)) / (1 + further * length + guess * length)
            for length in LENGTHS
        )
        taken, _ = run(acceptance, guess=guess, further=further, warm=False, tokens=2000)
        assert 1 / taken > 0.93 * best


def test_lengths_follow_what_is_accepted() -> None:
    """Long drafts where the text repeats, none where a pass costs more than it can bring."""
    assert run(0.97, guess=0.0, further=0.02)[1].count(7) > 40
    mean = [length for length in run(0.6, guess=0.2, further=0.05)[1] if length]
    assert sum(mean) / len(mean) < 3
    assert not any(run(0.9, guess=0.0, further=1.0)[1])
    assert Pace(Costs()).length(7) == 0  # before a token's time is known


def test_what_disturbs_a_token_is_not_its_cost() -> None:
    costs = Costs()
    costs.decoded(TOKEN_S)
    costs.decoded(100 * TOKEN_S)
    assert costs.token_s < 1.3 * TOKEN_S
    for _ in range(40):  # what lasts is
        costs.decoded(5 * TOKEN_S)
    assert costs.token_s > 4.9 * TOKEN_S


def test_a_tokens_time_is_looked_at_again() -> None:
    costs = Costs()
    costs.decoded(TOKEN_S)
    while not costs.stale():
        costs.round_ended(8, 2 * TOKEN_S)
    costs.decoded(TOKEN_S)
    assert not costs.stale()


def test_what_disturbs_a_round_does_not_stop_those_that_follow() -> None:
    """As where a round compiles a graph for what has not come before."""
    costs = Costs()
    pace = Pace(costs)
    costs.decoded(TOKEN_S)
    pace.round_ended(4, 4, 1.5 * TOKEN_S, 0.4 * TOKEN_S)
    for guessing_s in (0.4 * TOKEN_S, None):
        pace.round_ended(4, 4, 500 * TOKEN_S, guessing_s)
        for _ in range(5):
            assert pace.length(7) > 0
            pace.round_ended(4, 4, 1.5 * TOKEN_S, 0.4 * TOKEN_S)


def test_tokens_that_are_decoded_again_are_lost() -> None:
    """All of them, however long it took: it is no disturbance of the round that they fell in."""
    costs = Costs()
    costs.decoded(TOKEN_S)
    pace = Pace(costs)
    for _ in range(3):
        pace.round_ended(4, 4, 2 * TOKEN_S)
    costs.settled(10 * TOKEN_S)
    assert costs.may_lose  # they have gained nine
    costs.settled(10 * TOKEN_S)
    assert pace.length(7) == 0


def test_the_first_rounds_are_short() -> None:
    """A failed round of many guesses would use up what may be lost, and more are not tried.

    Costs are a CPU's, where guesses of text cost nothing.
    """
    lengths = run(1.0, guess=0.0, further=0.12)[1]
    assert lengths[0] < 4
    assert max(lengths) == 7
