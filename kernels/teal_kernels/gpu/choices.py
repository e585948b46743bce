"""Choosing after each of a few tokens on the device, so that the host reads one result for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from teal_kernels.gpu.chain import launch
from teal_kernels.gpu.sample import Choice, Chooser
from teal_kernels.gpu.step import captured


class RowChoices:
    """Chooses from the logits of a few tokens as a `DecodeStep` does, row after row.

    Noise is that of each token's position, and a penalty is over the tokens before it. There is a
    graph for each number of rows and kind of choice.
    """

    def __init__(self, logits: Tensor, length: int) -> None:
        """Bind to logits.

        Args:
            logits: [rows, vocab] float32, where each choice finds them.
            length: positions of the cache.
        """

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=logits.device)

        self.logits = logits
        self._position = buffer(1)
        self._chooser = Chooser(
            partial(launch, False),
            logits[0],
            buffer(1),
            self._position,
            buffer(1, 7),  # counts, of which there are none
            length,
        )
        self._graphs: dict[tuple[int, Choice], torch.cuda.CUDAGraph] = {}
        self._done = torch.cuda.Event() if logits.is_cuda else None

    def choose(
        self,
        count: int,
        position: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        tokens: Sequence[int],
        meanwhile: Callable[[Tensor], None] = lambda chosen: None,
    ) -> list[int]:
        """The token chosen after each of the first rows; waits for them.

        Each is right if the choices before it are the tokens whose logits follow.

        Args:
            count: rows.
            position: of the first row's token.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `Chooser.set`.
            tokens: the sequence up to the first row's token, itself included.
            meanwhile: called before the wait with [count] int32, where the device has the choices.

        Returns:
            As many tokens; -1 where a row has a NaN, or infinity, or nothing that is finite.
        """
        choice = self._chooser.set(
            temperature, top_k, top_p, seed, min_p, repetition_penalty, tokens
        )
        self._position.fill_(position)
        self._run(count, choice)
        history = self._chooser.history[position : position + count]
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.logits.device))
        meanwhile(history)
        if self._done is not None:
            self._done.synchronize()
        chosen: list[int] = history.tolist()
        return chosen

    def _run(self, count: int, choice: Choice) -> None:
        """The first time launches kernel by kernel, which compiles them, then captures."""
        if graph := self._graphs.get((count, choice)):
            graph.replay()
            return

        def choose_all() -> None:
            for row in self.logits[:count]:
                self._chooser.logits = row
                self._chooser.launch(choice)

        with torch.cuda.device_of(self.logits):
            choose_all()
            if self._done is not None:
                self._graphs[count, choice] = captured(choose_all)
