"""Speculative decoding: something cheap guesses a few tokens, the model checks them in one pass.

Every token is the model's own choice, from its own logits and with the noise of its position, as it
is without guesses; a guess that says the same saves it a pass. That is the rejection sampling of
Leviathan et al. (arXiv 2211.17192, section 2.3) for a guess that is certain: it stays with the
probability that the model gives it, and what is drawn in its place are the other tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from teal_cli.inference.drafters import Drafter, ModelDrafter
from teal_cli.inference.guesses import DraftCounts
from teal_cli.inference.pace import LENGTHS, Costs, Pace
from teal_cli.inference.sampling import Sampler, Sampling, at_position, penalised
from teal_cli.inference.session import Session

# Tokens that are decoded alone between two looks at whether guessing may pay again, where the
# device decodes ahead of the host.
_STRETCH = 16
# Two logits count as equal where they are nearer than this share of all logits' spread: a pass over
# several tokens sums in another order than a step, and rounds to the compute dtype.
_ROUNDING = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


class Drafting:
    """Decodes a dense session's tokens with guesses, as many as pay.

    The session holds the tokens that were heard and no more, whenever the loop is left.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        length: int | None = None,
        acceptance: float | None = None,
    ) -> None:
        """Guess with the first of the drafters that has a guess.

        Args:
            drafters: at least one.
            length: guesses a round, one of LENGTHS; None is what pays.
            acceptance: take guesses with this probability, whatever the model says: to measure
                speed where weights are random.
        """
        self.drafters = tuple(drafters)
        self.counts = DraftCounts()
        self.acceptance = acceptance
        self._length = length
        self._costs = Costs()
        self._paces = [Pace(self._costs) for _ in drafters]
        self._assumed = random.Random(0)

    @property
    def name(self) -> str:
        """Who guesses, as --draft has it."""
        return ",".join(drafter.name for drafter in self.drafters)

    @property
    def session(self) -> Session | None:
        """Of the model that guesses, whose sparsity may be changed; None where none does."""
        models = [drafter for drafter in self.drafters if isinstance(drafter, ModelDrafter)]
        return models[0].session if models else None

    def warm_up(self, session: Session) -> None:
        """Compile what checks and guesses, and learn what they take; before the first prompt."""
        sampler = Sampler(Sampling())
        most = session.max_length - 1
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            sampler.sample(session.verify([0])[0])
            token_s = time.perf_counter() - started
            checks = {}
            for length in (length for length in LENGTHS if length <= most):
                started = time.perf_counter()
                sampler.sample(session.verify([0] * (length + 1))[-1])
                checks[length + 1] = time.perf_counter() - started
            guesses = {}
            for pace, drafter in zip(self._paces, self.drafters, strict=True):
                started = time.perf_counter()
                if made := drafter.propose([], 0, min(4, most), sampler, 0):
                    guesses[pace] = (len(made), time.perf_counter() - started)
        self._costs.decoded(token_s)
        for count, seconds in checks.items():
            self._costs.checked(count, seconds)
        for pace, (count, seconds) in guesses.items():
            pace.guessed(count, seconds)

    def decode(
        self, session: Session, token: int, sampler: Sampler, most: int
    ) -> Generator[int, None, None]:
        """What `Session.decode` yields, with the help of guesses."""
        seed = sampler.draw_seed()
        end = min(session.position + most, session.max_length)
        # In these, what a step would round otherwise is decided by steps.
        careful = session.deterministic and sampler.sampling.greedy
        exact = session.position  # up to here, keys and values are a step's own
        while session.position < end:
            started = began = time.perf_counter()
            pace, guesses = self._guess(session, token, sampler, seed, end)
            if not guesses and session.decodes_ahead and not careful:
                stretch = min(_STRETCH, end - session.position)
                with closing(session.decode(token, sampler, stretch, seed)) as alone:
                    for token in alone:
                        self._costs.decoded(time.perf_counter() - started)
                        yield token
                        started = time.perf_counter()
                continue
            guessed = time.perf_counter()
            rows = session.verify([token, *guesses])
            if not guesses and exact == session.position:
                exact += 1
            self.counts.rounds += bool(guesses)
            spent, right = 0.0, 0
            for row, guess in zip(rows, [*guesses, None], strict=True):
                session.accept(token)
                if careful and exact < session.position and _is_tie(row, sampler, session):
                    row = _settled(session, exact)
                    exact = session.position
                token = self._choice(row, guess, sampler, seed, session)
                spent += time.perf_counter() - started
                self.counts.guessed += guess is not None
                if token != guess:
                    break
                right += 1
                self.counts.accepted += 1
                yield token
                started = time.perf_counter()
            if pace is None:
                self._costs.decoded(spent)
            else:
                pace.judged(len(guesses), right)
                self._costs.checked(len(guesses) + 1, spent - (guessed - began))
                self._costs.round_ended(right + 1, spent)
            yield token

    def _guess(
        self, session: Session, token: int, sampler: Sampler, seed: int, end: int
    ) -> tuple[Pace | None, list[int]]:
        """The first drafter's guesses that there are for what follows `token`, and its pace."""
        most = end - session.position - 1
        for pace, drafter in zip(self._paces, self.drafters, strict=True):
            wanted = pace.length(most) if self._length is None else min(self._length, most)
            if (length := _length(wanted)) == 0:
                continue
            started = time.perf_counter()
            made = drafter.propose(session.tokens, token, length, sampler, seed)
            if made := made[: _length(len(made))]:
                pace.guessed(len(made), time.perf_counter() - started)
                return pace, made
        return None, []

    def _choice(
        self, row: Tensor, guess: int | None, sampler: Sampler, seed: int, session: Session
    ) -> int:
        """The token after the session's last, from its logits [vocab_size]."""
        token = sampler.sample(row, session.tokens, at_position(seed, session.position))
        if self.acceptance is None or guess is None:
            return token
        if self._assumed.random() < self.acceptance:
            return guess
        return token if token != guess else (token + 1) % row.numel()


def _length(most: int) -> int:
    """The largest of LENGTHS up to `most`; 0 below all of them."""
    return max((length for length in LENGTHS if length <= most), default=0)


def _is_tie(row: Tensor, sampler: Sampler, session: Session) -> bool:
    """Whether rounding may decide which of the logits [vocab_size] is the largest."""
    logits = penalised(row, session.tokens, sampler.sampling.repetition_penalty)
    first, second = logits.topk(2).values.tolist()
    spread = float(logits[logits.isfinite()].std())
    return first - second < _ROUNDING[session.decoder.compute_dtype] * spread


def _settled(session: Session, start: int) -> Tensor:
    """The logits after the session's last token, with all from `start` on decoded by steps."""
    tokens = session.tokens[start:]
    session.rewind(start)
    return [session.step(token) for token in tokens][-1]
