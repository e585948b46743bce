"""Choosing after each of a few tokens on the device, so that the host reads one result for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teal_kernels.gpu.chain import launch
from teal_kernels.gpu.sample import Choice, Chooser
from teal_kernels.gpu.step import captured


class RowChoices:
    """Chooses from the logits of up to `most` tokens as a `DecodeStep` does, row after row.

    Noise is that of each token's position, and a penalty is over the tokens before it. There is a
    graph for each number of rows and kind of choice.
    """

    def __init__(self, vocab: int, length: int, device: torch.device, *, most: int) -> None:
        """Allocate.

        Args:
            vocab: logits of a row.
            length: positions of the cache.
            device: where the logits are.
            most: rows.
        """

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._logits = buffer(most, vocab, dtype=torch.float32)
        self._row = buffer(vocab, dtype=torch.float32)
        self._position = buffer(1, dtype=torch.int32)
        self._chooser = Chooser(
            partial(launch, False),
            self._row,
            buffer(1, dtype=torch.int32),
            self._position,
            buffer(1, 7, dtype=torch.int32),  # counts, of which there are none
            length,
        )
        self._graphs: dict[tuple[int, Choice], torch.cuda.CUDAGraph] = {}
        self._settings: tuple[Any, ...] = ()
        self._choice = Choice()
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def choose(
        self,
        logits: Tensor,
        position: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        tokens: Sequence[int],
    ) -> list[int]:
        """The token chosen after each of T rows; waits for them.

        Each is right if the choices before it are the tokens whose logits follow.

        Args:
            logits: [T, vocab] float32.
            position: of the first row's token.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: as in `Chooser.set`.
            tokens: the sequence up to the first row's token, itself included.

        Returns:
            T tokens; -1 where a row has a NaN, or infinity, or nothing that is finite.
        """
        settings = (temperature, top_k, top_p, seed, min_p, repetition_penalty)
        if settings != self._settings or repetition_penalty != 1:  # seen tokens change each time
            self._choice = self._chooser.set(*settings, tokens=tokens)
            self._settings = settings
        count = len(logits)
        self._logits[:count].copy_(logits)
        self._position.fill_(position)
        self._run(count)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(logits.device))
            self._done.synchronize()
        chosen: list[int] = self._chooser.history[position : position + count].tolist()
        return chosen

    def _run(self, count: int) -> None:
        """The first time launches kernel by kernel, which compiles them, then captures."""
        kind = (count, self._choice)
        if graph := self._graphs.get(kind):
            graph.replay()
            return

        def choose_all() -> None:
            for row in self._logits[:count]:
                self._row.copy_(row)
                self._chooser.launch(self._choice)

        with torch.cuda.device_of(self._row):
            choose_all()
            if self._done is not None:
                self._graphs[kind] = captured(choose_all)
