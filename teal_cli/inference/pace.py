"""How many tokens to guess at a time, from what guesses were worth and what they took."""

from __future__ import annotations

# Guesses in a round: few lengths, so that each is soon known. One more token is checked: on CUDA
# eight take as long as two, and nine longer.
LENGTHS = (1, 2, 3, 4, 7)
# What is never lost by more: this share of the time, and so many tokens' time at the beginning.
_SHARE = 0.01
_TOKENS = 1.0
# Gains of earlier rounds that later ones may lose again, in tokens' time.
_BANK = 16.0
_WEIGHT = 0.2  # of a new figure in a running mean
_LARGEST = (
    2.0  # what a new figure counts as at most, in means: what disturbs a token is not its cost
)
_FRESH = 64  # rounds in a row for which the time of a token is known
_KEPT = 0.9  # of earlier rounds' guesses, each round
# Text that repeats word by word is guessed like this. What does not pay then is not tried at all.
_BEST = 0.95
# Each further token that is checked, as a share of a token's time, before it is known.
_FURTHER = 0.02


class Costs:
    """Seconds that the model takes, and what guessing has lost so far; of all drafters."""

    def __init__(self) -> None:
        self.token_s = 0.0  # of a token that is decoded alone; 0 is unknown
        self._checks: dict[int, float] = {}
        self._spent_s = 0.0
        self._lost_s: float | None = None
        self._rounds = 0  # since the last token that was decoded alone

    def decoded(self, seconds: float) -> None:
        """A token was decoded alone."""
        self._rounds = 0
        self.token_s = _mean(self.token_s, seconds)
        self._spent_s += seconds

    def checked(self, count: int, seconds: float) -> None:
        """So many tokens were checked in one pass."""
        self._checks[count] = _mean(self._checks.get(count, 0.0), seconds)

    def round_ended(self, tokens: int, seconds: float) -> None:
        """A round of guesses gave so many tokens, at the cost of so much time in all."""
        self._spent_s += seconds
        self._rounds += 1
        lost = self._lost + seconds - tokens * self.token_s
        self._lost_s = max(lost, -_BANK * self.token_s)

    def settled(self, seconds: float) -> None:
        """Tokens that guesses had given were decoded again, alone, which took so long."""
        self._spent_s += seconds
        self._lost_s = self._lost + seconds

    @property
    def may_lose(self) -> bool:
        """Whether a round may be tried that perhaps does not pay."""
        return self.token_s > 0 and self._lost <= _SHARE * self._spent_s

    def stale(self, rounds: int = 0) -> bool:
        """Whether a token should be decoded alone, after so many more rounds.

        That tells what one takes now.
        """
        return self._rounds + rounds >= _FRESH

    def check_s(self, count: int) -> float:
        """What a pass over so many tokens takes, as far as that is known."""
        if count in self._checks:
            return self._checks[count]
        known = min(self._checks, key=lambda other: abs(other - count), default=1)
        return self._checks.get(known, self.token_s) + self.token_s * _FURTHER * (count - known)

    @property
    def _lost(self) -> float:
        return -_TOKENS * self.token_s if self._lost_s is None else self._lost_s


class Pace:
    """How many tokens one drafter is asked for."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._guess_s = 0.0  # of one token
        self._right, self._wrong = 1.0, 1.0  # so that the first rounds are short, and lose little

    @property
    def acceptance(self) -> float:
        """The chance that a guess is right after those before it were, from the last rounds."""
        return self._right / (self._right + self._wrong)

    def guessed(self, count: int, seconds: float) -> None:
        """So many tokens were guessed."""
        self._guess_s = _mean(self._guess_s, seconds / count)

    def round_s(self, guesses: int) -> float:
        """What a round with so many guesses takes, as far as that is known."""
        return self._costs.check_s(guesses + 1) + guesses * self._guess_s

    def round_ended(
        self, guesses: int, right: int, seconds: float, guessing_s: float | None = None
    ) -> None:
        """So many of a round's guesses were right, up to the first that was wrong.

        Args:
            guesses: in the round.
            right: of them.
            seconds: of the whole round.
            guessing_s: of it, before anything was checked; None where nobody can tell.
        """
        # What disturbs a round, or is compiled in it, would stop all that follow.
        counted = min(seconds, _LARGEST * self.round_s(guesses))
        if guessing_s is None:
            self.guessed(guesses, max(seconds - self._costs.check_s(guesses + 1), 0.0))
        else:
            self.guessed(guesses, guessing_s)
            self._costs.checked(guesses + 1, seconds - guessing_s)
        self._right = _KEPT * self._right + right
        self._wrong = _KEPT * self._wrong + (right < guesses)
        self._costs.round_ended(right + 1, counted)

    def length(self, most: int) -> int:
        """Guesses to ask for in the next round, at most `most`; 0 where they cannot pay now."""
        if not self._costs.may_lose:
            return 0
        lengths = [length for length in LENGTHS if length <= most]
        if not any(self._gain(length, _BEST) > 1 for length in lengths):
            return 0
        return max(lengths, key=lambda length: self._gain(length, self.acceptance))

    def _gain(self, length: int, acceptance: float) -> float:
        """How much faster tokens come than one by one (Leviathan et al., theorem 3.8)."""
        tokens = sum(acceptance**i for i in range(length + 1))
        return tokens * self._costs.token_s / self.round_s(length)


def _mean(before: float, seconds: float) -> float:
    return before + _WEIGHT * (min(seconds, _LARGEST * before) - before) if before else seconds
