"""How one token is decoded: what a session asks of a step, what a fused one is bound to, and the
step in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from teal_kernels.tensors import StepTensors
from torch import Tensor

from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.sparsity.skips import SkipCount


class Step(Protocol):
    """How one token is decoded: the fused kernels or the plain decoder."""

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """[num_hidden_layers, 7] float32; None is dense."""

    def __call__(self, token: int, position: int) -> Tensor:
        """Logits [vocab_size] float32 after `token` at `position`, whose keys are now cached."""

    @property
    def kept(self) -> Tensor:
        """Channels kept since the counts were cleared, [num_hidden_layers, 7] int64."""

    def clear_counts(self) -> None:
        """Start counting anew."""


@runtime_checkable
class ChoosingStep(Protocol):
    """A step that chooses the next token itself, so that the host need not keep up with it."""

    def expect(self, sparsity: float) -> None:
        """Use the kernels that are fastest at about this sparsity."""

    def start(
        self,
        token: int,
        position: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        tokens: Sequence[int],
    ) -> None:
        """Set the first token, those before it, and how those after it are chosen."""

    def advance(self) -> None:
        """Run the current token and choose the next, without waiting for either."""

    def chosen(self, position: int) -> int:
        """The token chosen after the one at `position`, one of the last two; waits for it.

        Negative where the logits are not finite.
        """

    def take_back(self, position: int) -> None:
        """Uncount what ran from `position` on, if anything; `start` comes before the next."""


def step_tensors(decoder: Decoder, cache: KVCache) -> StepTensors:
    """What a fused step of the decoder is bound to."""
    config, weights = decoder.config, decoder.weights
    cos, sin = decoder.rotary.tables(cache.length)
    return StepTensors(
        layers=weights.layers,
        embed_tokens=weights.embed_tokens,
        norm=weights.norm,
        lm_head=weights.lm_head,
        keys=cache.keys,
        values=cache.values,
        cos=cos,
        sin=sin,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        sliding_windows=config.sliding_windows,
    )


class DecoderStep:
    """Decodes with the plain decoder, in torch."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self.set_thresholds(None)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        self._thresholds = None if thresholds is None else thresholds.to(self._decoder.device)
        self._count = SkipCount(self._decoder, thresholds)

    def __call__(self, token: int, position: int) -> Tensor:
        hidden = self._decoder.forward(
            torch.tensor([token]),
            cache=self._cache,
            position=position,
            thresholds=self._thresholds,
            observe=self._count.observer(),
        )
        return self._decoder.logits(hidden)[0]

    @property
    def kept(self) -> Tensor:
        return self._count.skips().kept

    def clear_counts(self) -> None:
        self._count.clear()
