"""One token through the whole decoder, captured in CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from teal_kernels.gpu.chain import Chain
from teal_kernels.gpu.launch import StepLaunches, regime_of
from teal_kernels.gpu.sample import Choice
from teal_kernels.tensors import RecoveryVectors, StepTensors

# Positions that the first graphs of a step cover; each further set covers twice as many.
FIRST_REACH = 1024


class DecodeStep:
    """Runs one token a call, over weights and a cache that stay where they are.

    A step's first run launches kernel by kernel, which compiles them; those after it replay a
    graph. There is a graph for each combination of launches (dense or sparse), choice of the next
    token, and reach: how many positions attention's programs cover, so that the first tokens in a
    long cache do not pay for its length.

    Sums are float32 and their order varies from run to run, so logits do in their last bits,
    unless the step is deterministic (see `Chain`).

    A step that is broken off, by an exception or an interruption between two launches or in the
    midst of a capture, counts as not run: what it left is cleaned before anything else is done.
    """

    def __init__(
        self,
        tensors: StepTensors,
        *,
        launches: Mapping[float, StepLaunches] | None = None,
        dependent_launch: bool | None = None,
        deterministic: bool = False,
        capture: bool = True,
    ) -> None:
        """Bind the step to tensors, as a `Chain` is; without `capture` no graph is made."""
        self.chain = Chain(
            tensors,
            launches=launches,
            dependent_launch=dependent_launch,
            deterministic=deterministic,
        )
        self.device, self.length = self.chain.device, tensors.length
        self.capture = capture and self.device.type == "cuda"
        self._graphs: dict[tuple[StepLaunches, Choice | None, int], torch.cuda.CUDAGraph] = {}
        self._choice = Choice()
        self._at = 0  # position of the next `advance`
        self._begun: int | None = None  # position of a step that has not come to its end
        self._done: tuple[torch.cuda.Event, ...] = ()  # of the last two, by position's parity
        if self.device.type == "cuda":
            self._done = (torch.cuda.Event(), torch.cuda.Event())
        self.set_thresholds(None)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Change the thresholds of the tokens to come ([layers, 7] float32; None is dense)."""
        if thresholds is None:
            self.chain.thresholds.fill_(-torch.inf)
        else:
            self.chain.thresholds.copy_(thresholds)

    def set_vectors(self, vectors: RecoveryVectors | None) -> None:
        """Add these biases from the next token on and use these norms; None is the model's own."""
        self.chain.set_vectors(vectors)

    def expect(self, sparsity: float) -> None:
        """Use the launches that are fastest at about this sparsity; any give the right result."""
        self.chain.launches = self.chain.choices[regime_of(sparsity)]

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [layers, 7] int64 on the CPU."""
        self.clean()
        return self.chain.kept.long().cpu()

    def clear_counts(self) -> None:
        """Start counting anew."""
        self.clean()
        self.chain.kept.zero_()

    def __call__(self, token: int, position: int) -> Tensor:
        """Decode `token` at `position` and cache its keys and values; float32 [vocab_size].

        Raises:
            ValueError: the token or the position is out of range.
        """
        self._place(token, position)
        self._run(position, None)
        logits = self.chain.logits.clone()
        self._begun = None
        return logits

    def start(
        self,
        token: int,
        position: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        tokens: Sequence[int] = (),
    ) -> None:
        """Set the token that `advance` runs first, and how it chooses those after it.

        The settings mean what they do in `Chooser.set`; `tokens` are those before the first. No
        setting needs a new compilation. The same seed gives the same noise at the same position.

        Raises:
            ValueError: the token or the position is out of range.
        """
        self._place(token, position)
        self._choice = self.chain.chooser.set(
            temperature, top_k, top_p, seed, min_p, repetition_penalty, (*tokens, token)
        )
        self._at = position

    def follow(
        self,
        guesses: Tensor,
        choices: Tensor,
        position: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        assumed: int = -1,
    ) -> None:
        """As `start`, behind those guesses that are right: the host need not know which.

        A repetition penalty, which needs to know the tokens, cannot be set.

        Args:
            guesses: [n] int32 on the device, n < 8.
            choices: [n + 1] int32, what the model chose after the token at `position` and each
                guess, where the device finds it.
            position: of that token.
            temperature, top_k, top_p, min_p, seed: as in `start`.
            assumed: as in `Chooser.follow`.

        Raises:
            ValueError: the positions are not all within the cache.
        """
        behind = position + len(choices)
        if not 0 <= position < behind < self.length:
            raise ValueError(f"positions {position} to {behind} are outside {self.length}")
        self.clean()
        chooser = self.chain.chooser
        self._choice = chooser.set(temperature, top_k, top_p, seed, min_p)
        with torch.cuda.device_of(self.chain.h):
            chooser.follow(guesses, choices, position, assumed)
        self._at = behind

    def advance(self) -> None:
        """Run the current token and choose the next, without waiting for either.

        Raises:
            ValueError: the cache is full.
            RuntimeError: a step was broken off, and `start` did not come after it.
        """
        if self._begun is not None:
            raise RuntimeError("a step was broken off: start again before advancing")
        if self._at >= self.length:
            raise ValueError(f"the cache is full: it holds {self.length} positions")
        self._run(self._at, self._choice)
        if self._done:
            self._done[self._at % 2].record(torch.cuda.current_stream(self.device))
        self._at += 1
        self._begun = None

    def chosen(self, position: int) -> int:
        """The token that was chosen after the one at `position`, of the last two; waits for it.

        It is -1 where the logits have a NaN, or infinity, or nothing that is finite.
        """
        if self._done:
            self._done[position % 2].synchronize()
        return int(self.chain.chooser.history[position])

    @property
    def next_token(self) -> Tensor:
        """[1] int32 on the device: what the last `advance` chose; 0 where it could not."""
        return self.chain.token

    def take_back(self, position: int) -> None:
        """Uncount what ran from `position` on, at most two steps; `start` comes before the next.

        What they cached stays until their positions are computed again.
        """
        self.clean()
        self._at = position
        self.chain.kept.copy_(self.chain.chooser.counts_before(position))

    def clean(self) -> None:
        """Make good what a step that was broken off has left, if there is one.

        All that kernels add to is started within a step before it is added to. Tokens and positions
        are set by `start`, and what was cached is written anew with its position.
        """
        if self._begun is None:
            return
        self.chain.kept.copy_(self.chain.chooser.counts_before(self._begun))
        self._begun = None

    def _place(self, token: int, position: int) -> None:
        chain, vocab = self.chain, self.chain.tensors.vocab_size
        if not 0 <= token < vocab or not 0 <= position < self.length:
            raise ValueError(
                f"token {token} at position {position} is outside {vocab} tokens "
                f"or {self.length} positions"
            )
        self.clean()
        chain.token.fill_(token)
        chain.position.fill_(position)
        chain.chooser.shift.zero_()
        chain.chooser.counts_before(position).copy_(chain.kept)

    def _run(self, position: int, choice: Choice | None) -> None:
        """The first time launches kernel by kernel, which compiles them, then captures.

        The caller says when the step has come to its end.
        """
        chain, reach = self.chain, FIRST_REACH
        self._begun = position
        while reach <= position:
            reach *= 2
        chain.reach = min(reach, self.length)
        kind = (chain.launches, choice, chain.reach)
        if graph := self._graphs.get(kind):
            graph.replay()
            return
        with torch.cuda.device_of(chain.h):
            chain.launch_all(choice)
            if self.capture:
                self._graphs[kind] = captured(lambda: chain.launch_all(choice))


def captured(launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `launch` launches."""
    graph = torch.cuda.CUDAGraph()
    # What the collector frees during a capture can end it: memory or graphs of older steps.
    gc.collect()
    gc.disable()
    try:
        # The outer context puts the stream back where a capture that is broken does not end well.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            launch()
    finally:
        gc.enable()
    return graph
