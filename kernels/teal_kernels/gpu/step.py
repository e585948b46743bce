"""One token through the whole decoder, captured in CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teal_kernels.gpu.chain import Chain
from teal_kernels.gpu.launch import StepLaunches, regime_of
from teal_kernels.gpu.sample import Choice

# Positions that the first graphs of a step cover; each further set covers twice as many.
_FIRST_REACH = 1024


class DecodeStep(Chain):
    """Runs one token a call, over weights and a cache that stay where they are.

    A step's first run launches kernel by kernel, which compiles them; those after it replay a
    graph. There is a graph for each combination of launches (dense or sparse), choice of the next
    token, and reach: how many positions attention's programs cover, so that the first tokens in a
    long cache do not pay for its length.

    Sums are float32 and their order varies from run to run, so logits do in their last bits,
    unless the step is deterministic (see `Chain`).
    """

    def __init__(self, *, capture: bool = True, **tensors: Any) -> None:
        """Bind the step to tensors (see `Chain`); without `capture` no graph is made."""
        super().__init__(**tensors)
        self.capture = capture and self.device.type == "cuda"
        self._graphs: dict[tuple[StepLaunches, Choice | None, int], torch.cuda.CUDAGraph] = {}
        self._choice = Choice()
        self._at = 0  # position of the next `advance`
        self._done: tuple[torch.cuda.Event, ...] = ()  # of the last two, by position's parity
        if self.device.type == "cuda":
            self._done = (torch.cuda.Event(), torch.cuda.Event())
        self.set_thresholds(None)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Change the thresholds of the tokens to come ([layers, 7] float32; None is dense)."""
        if thresholds is None:
            self.thresholds.fill_(-torch.inf)
        else:
            self.thresholds.copy_(thresholds)

    def expect(self, sparsity: float) -> None:
        """Use the launches that are fastest at about this sparsity; any give the right result."""
        self.launches = self.choices[regime_of(sparsity)]

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [layers, 7] int64 on the CPU."""
        return self._kept.long().cpu()

    def clear_counts(self) -> None:
        """Start counting anew."""
        self._kept.zero_()

    def __call__(self, token: int, position: int) -> Tensor:
        """Decode `token` at `position` and cache its keys and values; float32 [vocab_size].

        Raises:
            ValueError: the token or the position is out of range.
        """
        self._place(token, position)
        self._run(position, None)
        return self.logits.clone()

    def start(
        self,
        token: int,
        position: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Set the token that `advance` runs first, and how it chooses those after it.

        The settings mean what they do in `Chooser.set`. None of them needs a new compilation. The
        same seed gives the same noise at the same position.

        Raises:
            ValueError: the token or the position is out of range.
        """
        self._place(token, position)
        self._choice = self.chooser.set(temperature, top_k, top_p, seed)
        self._at = position
        self.chooser.kept_before[(position - 1) % 2].copy_(self._kept)

    def advance(self) -> None:
        """Run the current token and choose the next, without waiting for either.

        Raises:
            ValueError: the cache is full.
        """
        if self._at >= self.context:
            raise ValueError(f"the cache is full: it holds {self.context} positions")
        self._run(self._at, self._choice)
        if self._done:
            self._done[self._at % 2].record(torch.cuda.current_stream(self.device))
        self._at += 1

    def chosen(self, position: int) -> int:
        """The token that was chosen after the one at `position`, of the last two; waits for it."""
        if self._done:
            self._done[position % 2].synchronize()
        return int(self.chooser.history[position])

    def take_back(self) -> None:
        """Uncount the last `advance`, whose token is not wanted; `start` comes before the next.

        What it cached stays until its position is computed again.
        """
        self._at -= 1
        self._kept.copy_(self.chooser.kept_before[(self._at - 1) % 2])

    def _place(self, token: int, position: int) -> None:
        if not 0 <= token < self.vocab or not 0 <= position < self.context:
            raise ValueError(
                f"token {token} at position {position} is outside {self.vocab} tokens "
                f"or {self.context} positions"
            )
        self.token.fill_(token)
        self.position.fill_(position)

    def _run(self, position: int, choice: Choice | None) -> None:
        """The first time launches kernel by kernel, which compiles them, then captures."""
        self.reach = _FIRST_REACH
        while self.reach <= position:
            self.reach *= 2
        self.reach = min(self.reach, self.context)
        kind = (self.launches, choice, self.reach)
        if graph := self._graphs.get(kind):
            graph.replay()
            return
        with torch.cuda.device_of(self.h):
            self.launch_all(choice)
            if self.capture:
                self._graphs[kind] = _captured(lambda: self.launch_all(choice))


def _captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `launch` launches."""
    graph = torch.cuda.CUDAGraph()
    # What the collector frees during a capture can end it: memory or graphs of older steps.
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            launch()
    finally:
        gc.enable()
    return graph
