"""Speculative decoding: something cheap guesses a few tokens, the model checks them in one pass.

Every token is the model's own choice, from its own logits and with the noise of its position, as it
is without guesses; a guess that says the same saves it a pass. That is the rejection sampling of
Leviathan et al. (arXiv 2211.17192, section 2.3) for a guess that is certain: it stays with the
probability that the model gives it, and what is drawn in its place are the other tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

import numpy
import torch
from torch import Tensor

from teal_cli.inference.drafters import Drafter, ModelDrafter
from teal_cli.inference.guesses import DraftCounts, Guesses, known
from teal_cli.inference.pace import LENGTHS, Costs, Pace
from teal_cli.inference.sampling import Sampler, Sampling, at_position, penalised
from teal_cli.inference.session import Session

# Tokens that are decoded alone between two looks at whether guessing may pay again, where the
# device decodes ahead of the host.
_STRETCH = 16
# Tokens that are decoded alone to learn what one takes: at first, and later.
_ALONE, _AGAIN = 6, 2
# Tokens of passes that are decoded by steps at once where no guess follows: a tie would ask for it
# later, and for all that came after them.
_FEW = 4
# Two logits count as equal where they are nearer than this share of all logits' spread: a pass over
# several tokens sums in another order than a step, and rounds to the compute dtype.
_SAMPLED = 16  # the spread is that of every sixteenth
# On a CPU two of the demo model's five likeliest differ by up to 3.7e-3 from what steps give (1960
# positions of prose, code and digits in passes of five; median 4.5e-4, 99th percentile 2e-3).
_ROUNDING = {torch.float32: 4e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


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
        self._known: set[tuple[bool, ...]] = set()  # ways of choosing that are compiled
        self._costs = Costs()
        self._paces = [Pace(self._costs) for _ in drafters]
        self._assumed = random.Random(0)
        # By whom and what is guessed for the next round, which the device has begun already.
        self._ahead: tuple[int, Tensor] | None = None

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
        sampler, start, taken = Sampler(Sampling()), session.position, []
        started = time.perf_counter()
        with closing(session.decode(0, sampler, _ALONE, 0)) as alone:
            for _ in alone:
                taken.append(time.perf_counter() - started)
                started = time.perf_counter()
        session.rewind(start)
        # What disturbs only ever adds, and a token that seems slow lets guesses seem to pay.
        self._costs.decoded(min(taken))
        self._learn(session, sampler)

    def _learn(self, session: Session, sampler: Sampler) -> None:
        """Compile guesses and the passes over them with one way of choosing, and time them.

        What they cache lies behind the session's tokens, where the next ones come.
        """
        self._known.add(_kind(sampler.sampling))
        room = session.max_length - session.position
        for length in (length for length in LENGTHS if length < room):
            for _ in range(2):  # the first compiles
                started = time.perf_counter()
                rows = self._judge(session, 0, [0] * length, sampler, 0, careful=False)[1]
                self._choice(rows[-1], None, -1, sampler, 0, session)
                seconds = time.perf_counter() - started
            self._costs.checked(length + 1, seconds)
        for pace, drafter in zip(self._paces, self.drafters, strict=True):
            drafter.read(session.tokens)
            said = [*session.tokens, 0]  # one that the first time has to read
            for _ in range(2):
                started = time.perf_counter()
                made = drafter.propose(said, 0, min(4, room - 3), sampler, 0)
                count = len(known(made))
                seconds = time.perf_counter() - started
            if isinstance(drafter, ModelDrafter) and isinstance(made, Tensor):
                # What goes on from them is compiled too.
                chosen = torch.zeros(count + 1, dtype=torch.int32, device=made.device)
                drafter.go_on(made, chosen, 1, sampler, 0, -1)
            if count:
                pace.guessed(count, seconds)

    def decode(
        self,
        session: Session,
        token: int,
        sampler: Sampler,
        most: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Generator[int, None, None]:
        """What `Session.decode` yields, with the help of guesses; see `Guesser`."""
        seed = sampler.draw_seed()
        end = min(session.position + most, session.max_length)
        # In these, what a step would round otherwise is decided by steps.
        careful = session.deterministic and sampler.sampling.greedy
        if session.decodes_ahead and _kind(sampler.sampling) not in self._known:
            self._learn(session, sampler)
        exact = session.position  # up to here, keys and values are a step's own
        self._ahead = None
        for index, drafter in enumerate(self.drafters):
            if self._wanted(index, end - session.position - 1):
                drafter.read(session.tokens, interrupted)
        while session.position < end:
            started = began = time.perf_counter()
            asked, by, guesses = self._guess(session, token, sampler, seed, end)
            if careful and by is None and 0 < session.position - exact <= _FEW:
                self._settle(session, exact)
                exact = session.position
                started = time.perf_counter()
            steady = not careful or exact == session.position
            if by is None and steady and (session.decodes_ahead or not asked):
                stretch = 1 if asked else _AGAIN if self._costs.stale() else _STRETCH
                stretch = min(stretch, end - session.position)
                token = yield from self._alone(session, token, sampler, stretch, seed, started)
                exact = session.position
                continue
            guessed = time.perf_counter()
            assumed, on_device = self._assume(guesses), isinstance(guesses, Tensor)
            made_by = None if by is None or not on_device else self.drafters[by]
            go_on = partial(self._go_on, session, by, guesses, assumed, sampler, seed, end)
            guesses, rows = self._judge(
                session, token, guesses, sampler, seed, careful=careful, meanwhile=go_on
            )
            if isinstance(made_by, ModelDrafter):
                made_by.made(token, guesses)
            if not guesses and exact == session.position:
                exact += 1
            self.counts.rounds += bool(guesses)
            spent, right = 0.0, 0
            for row, guess in zip(rows, [*guesses, None], strict=True):
                session.accept(token)
                if careful and exact < session.position and _is_tie(row, sampler, session):
                    settling = time.perf_counter()
                    row = self._settle(session, exact)
                    exact = session.position
                    # Of all rounds since `exact`: in this one it would pass for a disturbance.
                    started += time.perf_counter() - settling
                token = self._choice(row, guess, assumed >> right, sampler, seed, session)
                spent += time.perf_counter() - started
                self.counts.guessed += guess is not None
                if token != guess:
                    break
                right += 1
                self.counts.accepted += 1
                yield token
                started = time.perf_counter()
            if by is None:
                self._costs.decoded(spent)
            else:
                # Where the device did both, the host cannot tell them apart.
                guessing_s = None if on_device else guessed - began
                self._paces[by].round_ended(len(guesses), right, spent, guessing_s)
            yield token

    def _alone(
        self,
        session: Session,
        token: int,
        sampler: Sampler,
        most: int,
        seed: int,
        started: float,
    ) -> Generator[int, None, int]:
        """Yield what the session decodes without guesses, and return the last of it.

        The first of them has taken the time since `started`.
        """
        with closing(session.decode(token, sampler, most, seed)) as alone:
            for token in alone:
                self._costs.decoded(time.perf_counter() - started)
                yield token
                started = time.perf_counter()
        return token

    def _settle(self, session: Session, start: int) -> Tensor:
        """The logits after the session's last token, with all from `start` on decoded by steps."""
        began, tokens = time.perf_counter(), session.tokens[start:]
        session.rewind(start)
        logits = [session.step(token) for token in tokens][-1]
        self._costs.settled(time.perf_counter() - began)
        return logits

    def _guess(
        self, session: Session, token: int, sampler: Sampler, seed: int, end: int
    ) -> tuple[bool, int | None, Guesses]:
        """Whether a drafter was asked; which is the first with guesses, and its guesses."""
        most, asked = end - session.position - 1, False
        if self._ahead is not None:
            (by, ahead), self._ahead = self._ahead, None
            self.drafters[by].read(session.tokens)
            return True, by, ahead
        if self._length is None and self._costs.stale():
            return False, None, []
        for by, drafter in enumerate(self.drafters):
            if (length := self._wanted(by, most)) == 0:
                continue
            asked = True
            made = drafter.propose(session.tokens, token, length, sampler, seed)
            if length := _length(len(made)):
                return True, by, made[:length]
        return asked, None, []

    def _wanted(self, by: int, most: int) -> int:
        """How many guesses a drafter is asked for, of at most so many; one of LENGTHS, or 0."""
        wanted = self._paces[by].length(most) if self._length is None else self._length
        return _length(min(wanted, most))

    def _go_on(
        self,
        session: Session,
        by: int | None,
        guesses: Guesses,
        assumed: int,
        sampler: Sampler,
        seed: int,
        end: int,
        choices: Tensor,
    ) -> None:
        """Have the device guess on behind what it chooses, before the host knows that.

        So it does not wait for the host, nor for whoever hears the tokens.
        """
        stale = self._length is None and self._costs.stale(1)
        if by is None or not isinstance(guesses, Tensor) or stale:
            return
        drafter, room = self.drafters[by], end - session.position - len(choices) - 1
        if isinstance(drafter, ModelDrafter) and (length := self._wanted(by, room)):
            made = drafter.go_on(guesses, choices, length, sampler, seed, assumed)
            self._ahead = None if made is None else (by, made)

    def _judge(
        self,
        session: Session,
        token: int,
        guesses: Guesses,
        sampler: Sampler,
        seed: int,
        *,
        careful: bool,
        meanwhile: Callable[[Tensor], None] = lambda choices: None,
    ) -> tuple[list[int], Sequence[Tensor | int]]:
        """The guesses; after `token` and each, the logits [vocab_size] or what was chosen."""
        if len(guesses) and not careful:
            found = session.choices(token, guesses, sampler, seed, meanwhile)
            if found is not None:
                return found
        guesses = known(guesses)
        return guesses, list(session.verify([token, *guesses]))

    def _choice(
        self,
        row: Tensor | int,
        guess: int | None,
        assumed: int,
        sampler: Sampler,
        seed: int,
        session: Session,
    ) -> int:
        """The token after the session's last, from its logits [vocab_size] where not chosen yet.

        Whether the guess counts as right is the lowest bit of `assumed`; where that is negative,
        it is what the guess is.
        """
        token = row
        if isinstance(token, Tensor):
            token = sampler.sample(token, session.tokens, at_position(seed, session.position))
        if assumed < 0 or guess is None:
            return token
        if assumed & 1:
            return guess
        return token if token != guess else (token + 1) % session.decoder.config.vocab_size

    def _assume(self, guesses: Guesses) -> int:
        """A bit for each guess, whether it counts as right whatever was chosen; -1: none is set."""
        if self.acceptance is None:
            return -1
        return sum((self._assumed.random() < self.acceptance) << i for i in range(len(guesses)))


def _length(most: int) -> int:
    """The largest of LENGTHS up to `most`; 0 below all of them."""
    return max((length for length in LENGTHS if length <= most), default=0)


def _kind(sampling: Sampling) -> tuple[bool, ...]:
    """What a GPU's graph of a choice depends on."""
    drawn = not sampling.greedy
    return (
        drawn and sampling.top_k > 0,
        drawn and sampling.top_p < 1,
        drawn and sampling.min_p > 0,
        sampling.repetition_penalty != 1,
    )


def _is_tie(row: Tensor | int, sampler: Sampler, session: Session) -> bool:
    """Whether rounding may decide which of the logits [vocab_size] is the largest."""
    assert isinstance(row, Tensor)
    logits = penalised(row, session.tokens, sampler.sampling.repetition_penalty)
    # Not by torch, whose threads would still be in the way when the next token is begun.
    values = logits.numpy(force=True)
    with numpy.errstate(invalid="ignore"):
        spread = values[::_SAMPLED].std()
    if not numpy.isfinite(spread):
        spread = values[numpy.isfinite(values)].std()
    least = values.max() - _ROUNDING[session.decoder.compute_dtype] * spread
    return bool(numpy.count_nonzero(values > least) > 1)
