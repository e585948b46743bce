"""Choosing the next token on the device, so that no step waits for the host.

Top-k, top-p and min-p each leave the tokens whose logits reach a cut; the largest of what is left,
with Gumbel noise added, is the choice. A repetition penalty changes the logits before all of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from teal_kernels.gpu.draw import (
    ROWS,
    advance_kernel,
    best_kernel,
    follow_kernel,
    penalise_kernel,
)
from teal_kernels.gpu.radix import BINS, LEVELS, peak_kernel, select_kernel

_BLOCK = 256  # logits a program
_CHOICES = 8  # of a round that is followed, at most

# Temperatures and penalties are held between this and its inverse, so that no product with a logit
# leaves float32; a temperature below it counts as 0.
_LEAST = 1e-30


class Choice(NamedTuple):
    """What a choice takes besides the likeliest; how strict it is lies in device buffers."""

    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False

    @property
    def selections(self) -> int:
        """How many cuts a radix selection finds."""
        return self.top_k + self.top_p


class _Launch(Protocol):
    def __call__(
        self, kernel: Any, grid: tuple[int, ...], num_warps: int, **arguments: Any
    ) -> None: ...


class Chooser:
    """Chooses the token after a step's logits, and steps one position on."""

    def __init__(
        self,
        launch: _Launch,
        logits: Tensor,
        token: Tensor,
        position: Tensor,
        kept: Tensor,
        length: int,
    ) -> None:
        """Bind to a step's buffers.

        Args:
            launch: launches a kernel as the step's own are launched.
            logits: [vocab_size] float32, which it reads.
            token: [1] int32, which it sets.
            position: [1] int32, which it advances.
            kept: [layers, 7] int32, the step's counts of channels.
            length: positions of the cache.
        """
        self._launch = launch
        self.logits, self.token, self.position, self.kept = logits, token, position, kept
        self.vocab = logits.numel()
        self.block = max(16, min(_BLOCK, triton.next_power_of_2(self.vocab)))
        self.programs = triton.cdiv(self.vocab, self.block)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=logits.device)

        self.temperature, self.seed = buffer(1), buffer(1, dtype=torch.int64)
        self.top_k, self.top_p = buffer(1, dtype=torch.int64), buffer(1, dtype=torch.float64)
        self.floor, self.penalty = buffer(1), buffer(1)
        self.seen = buffer(self.vocab, dtype=torch.uint8)  # whether a token is in the sequence
        self.penalised = buffer(self.vocab)
        self.peaks = buffer(self.programs)
        self.bins = buffer(2 * LEVELS, BINS, dtype=torch.int64)
        self.state = buffer(2 * LEVELS, 2, dtype=torch.int64)
        self.best, self.index = buffer(self.programs), buffer(self.programs, dtype=torch.int32)
        self.shift = buffer(1, dtype=torch.int32)  # how far the host is ahead of the position
        self.kept_before = buffer(ROWS.value, *kept.shape, dtype=kept.dtype)
        # In the host's memory, where the kernel writes it: the host waits for an event, not a copy.
        self.history = torch.zeros(
            length, dtype=torch.int32, pin_memory=logits.device.type == "cuda"
        )
        self._settings: tuple[float, ...] = ()
        self._choice = Choice()

    def set(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        tokens: Sequence[int] = (),
    ) -> Choice:
        """Choose by these from the next launch on; the kernels that it takes.

        Args:
            temperature: 0 is greedy, and so is what is nearly 0.
            top_k: how many tokens stay; 0 or less is all.
            top_p: the smallest set of those that top-k left which reaches this share of their
                probability stays; 1 is all.
            seed: of the noise; from -2^63 to 2^63 - 1.
            min_p: of those, the tokens stay that have this share of the likeliest's probability.
            repetition_penalty: positive logits of tokens that were seen are divided by it, and
                negative ones multiplied; 1 changes nothing.
            tokens: those seen so far; the tokens chosen from now on are added.
        """
        settings = (temperature, top_k, top_p, seed, min_p, repetition_penalty)
        penalised = repetition_penalty != 1
        if settings == self._settings and not penalised:  # what was seen changes each time
            return self._choice
        self._settings = ()  # until all is set
        greedy = temperature < _LEAST or top_k == 1
        temperature = 0.0 if greedy else min(temperature, 1 / _LEAST)
        self.temperature.fill_(temperature)
        self.top_k.fill_(min(top_k, self.vocab))
        self.top_p.fill_(top_p)
        self.seed.fill_(seed)
        self.floor.fill_(temperature * math.log(min_p) if min_p > 0 else -math.inf)
        if penalised:
            self.penalty.fill_(min(max(repetition_penalty, _LEAST), 1 / _LEAST))
            self.seen.zero_()
            self.seen[torch.tensor(tokens, dtype=torch.int64, device=self.seen.device)] = 1
        choice = Choice(penalty=penalised)
        if not greedy:
            choice = Choice(0 < top_k < self.vocab, top_p < 1, min_p > 0, penalised)
        self._settings, self._choice = settings, choice
        return choice

    def counts_before(self, position: int) -> Tensor:
        """What `kept` stood at before the step at a position, one of the last; to be set at first.

        `advance_kernel` notes it for the position that follows.
        """
        return self.kept_before[(position - 1) % ROWS.value]

    def follow(self, guesses: Tensor, choices: Tensor, first: int, assumed: int) -> None:
        """Set the token that was chosen after the last right guess, and its position.

        Args:
            guesses: [n] int32 on the device.
            choices: [n + 1] int32, what was chosen after the token before them and each of them.
            first: position of that token; the host takes first + n + 1 for the new one.
            assumed: a bit for each guess, whether it counts as right whatever was chosen; -1
                assumes nothing.
        """
        self._launch(
            follow_kernel,
            (1,),
            4,
            token_ptr=self.token,
            position_ptr=self.position,
            shift_ptr=self.shift,
            kept_ptr=self.kept,
            kept_before_ptr=self.kept_before,
            guesses_ptr=guesses,
            choices_ptr=choices,
            first=first,
            guesses=len(guesses),
            assumed=assumed,
            vocab=self.vocab,
            kept_size=self.kept.numel(),
            BLOCK=_CHOICES,
            KEPT=triton.next_power_of_2(self.kept.numel()),
        )

    def launch(self, choice: Choice) -> None:
        """Launch the kernels of one choice."""
        self.select(choice)
        self.draw(choice)

    def select(self, choice: Choice) -> None:
        """Penalise what was seen; then find the cut of top-k, and then that of top-p."""
        if choice.penalty:
            self._launch_penalise()
        if choice.selections or choice.min_p:
            self._launch_peak(choice)
        level = 0
        for wanted, by_mass in ((choice.top_k, False), (choice.top_p, True)):
            for digit in range(LEVELS if wanted else 0):
                self._launch_select(choice, level, digit, by_mass)
                level += 1

    def draw(self, choice: Choice) -> None:
        """Draw from what `select` left, and step on."""
        self._launch(
            best_kernel,
            (self.programs,),
            4,
            best_ptr=self.best,
            index_ptr=self.index,
            logits_ptr=self._scores(choice),
            bins_ptr=self.bins,
            state_ptr=self.state,
            peaks_ptr=self.peaks,
            temperature_ptr=self.temperature,
            floor_ptr=self.floor,
            seed_ptr=self.seed,
            position_ptr=self.position,
            V=self.vocab,
            programs=self.programs,
            levels=LEVELS * choice.selections,
            CUT=choice.selections > 0,
            MIN_P=choice.min_p,
            BLOCK=self.block,
            PEAKS=triton.next_power_of_2(self.programs),
        )
        self._launch_advance(choice)

    def _scores(self, choice: Choice) -> Tensor:
        """The logits that are chosen from."""
        return self.penalised if choice.penalty else self.logits

    def _launch_penalise(self) -> None:
        self._launch(
            penalise_kernel,
            (self.programs,),
            4,
            penalised_ptr=self.penalised,
            logits_ptr=self.logits,
            seen_ptr=self.seen,
            penalty_ptr=self.penalty,
            V=self.vocab,
            BLOCK=self.block,
        )

    def _launch_peak(self, choice: Choice) -> None:
        self._launch(
            peak_kernel,
            (self.programs,),
            4,
            peaks_ptr=self.peaks,
            bins_ptr=self.bins,
            logits_ptr=self._scores(choice),
            V=self.vocab,
            bins_size=self.bins.numel(),
            CLEARED=triton.next_power_of_2(triton.cdiv(self.bins.numel(), self.programs)),
            BLOCK=self.block,
        )

    def _launch_select(self, choice: Choice, level: int, digit: int, by_mass: bool) -> None:
        self._launch(
            select_kernel,
            (self.programs,),
            4,
            bins_ptr=self.bins,
            state_ptr=self.state,
            logits_ptr=self._scores(choice),
            peaks_ptr=self.peaks,
            temperature_ptr=self.temperature,
            top_k_ptr=self.top_k,
            top_p_ptr=self.top_p,
            V=self.vocab,
            programs=self.programs,
            level=level,
            digit=digit,
            BY_MASS=by_mass,
            maxnreg=128,  # so that a vocabulary of 128 256 takes one wave of an H100
            BLOCK=self.block,
            PEAKS=triton.next_power_of_2(self.programs),
        )

    def _launch_advance(self, choice: Choice) -> None:
        self._launch(
            advance_kernel,
            (1,),
            4,
            token_ptr=self.token,
            position_ptr=self.position,
            history_ptr=self.history,
            shift_ptr=self.shift,
            kept_ptr=self.kept,
            kept_before_ptr=self.kept_before,
            seen_ptr=self.seen,
            best_ptr=self.best,
            index_ptr=self.index,
            programs=self.programs,
            kept_size=self.kept.numel(),
            PENALTY=choice.penalty,
            PROGRAMS=triton.next_power_of_2(self.programs),
            KEPT=triton.next_power_of_2(self.kept.numel()),
        )
