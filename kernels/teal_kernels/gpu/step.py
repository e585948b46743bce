"""One token through the whole decoder, captured in one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teal_kernels.gpu.chain import Chain
from teal_kernels.gpu.launch import StepLaunches
from teal_kernels.gpu.sample import Choice


class DecodeStep(Chain):
    """Runs one token a call, over weights and a cache that stay where they are.
    The first step launches kernel by kernel, which compiles them; those after it replay a graph.
    Sums are float32 and their order varies from run to run, so logits do in their last bits.
    """

    def __init__(self, *, capture: bool = True, **tensors: Any) -> None:
        """Bind the step to tensors (see `Chain`); without `capture` no graph is made."""
        super().__init__(**tensors)
        self.capture = capture and self.device.type == "cuda"
        self._graphs: dict[tuple[StepLaunches, Choice | None], torch.cuda.CUDAGraph] = {}
        self.set_thresholds(None)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Change the sparsity of the tokens to come ([layers, 7] float32; None is dense)."""
        sparse = thresholds is not None and bool((thresholds > 0).any())
        self.launches = self.choices[sparse]
        if thresholds is None:
            self.thresholds.fill_(-torch.inf)
        else:
            self.thresholds.copy_(thresholds)

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
        self._run(None)
        return self.logits.clone()

    def start(self, token: int, position: int, *, temperature: float = 0.0, seed: int = 0) -> None:
        """Set the token that `advance` runs first, and how it chooses those after it."""
        self._place(token, position)
        self.chooser.temperature.fill_(temperature)
        self.chooser.seed.fill_(seed)

    def advance(self) -> None:
        """Run the current token, choose the next, step on; history[position] is the choice.

        Nothing waits for the host: the caller reads `history` when it wants, and does not go past
        the cache's length.
        """
        self._run(Choice())

    def _place(self, token: int, position: int) -> None:
        if not 0 <= token < self.vocab or not 0 <= position < self.context:
            raise ValueError(
                f"token {token} at position {position} is outside {self.vocab} tokens "
                f"or {self.context} positions"
            )
        self.token.fill_(token)
        self.position.fill_(position)

    def _run(self, choice: Choice | None) -> None:
        """The first time launches kernel by kernel, which compiles them, then captures."""
        if graph := self._graphs.get((self.launches, choice)):
            graph.replay()
            return
        with torch.cuda.device_of(self.h):
            self.launch_all(choice)
            if self.capture:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.launch_all(choice)
                self._graphs[self.launches, choice] = graph
