"""How tokens are read and decoded: what a session asks of prefill and of a step, what fused ones
are bound to, and both in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from teal_kernels.tensors import RecoveryVectors, StepTensors
from torch import Tensor

from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.sparsity.skips import SkipCount


class Prefill(Protocol):
    """How several tokens are read at once, dense: the fused kernels or the plain decoder."""

    def layers(self, hidden: Tensor, position: int, first: int, last: int) -> Tensor:
        """Hidden [T, hidden_size] after layers `first` to `last`; their T positions are cached.

        `hidden` may be overwritten.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """What the last layer gives, [T, hidden_size] → logits [T, vocab_size] float32."""

    def read(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [T, vocab_size] float32 after each of T tokens; their positions are cached."""


class Step(Protocol):
    """How one token is decoded: the fused kernels or the plain decoder."""

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """[num_hidden_layers, 7] float32; None is dense."""

    def set_vectors(self, vectors: RecoveryVectors | None) -> None:
        """What the tokens to come get of biases and norms; None is the model's own."""

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

    def follow(
        self,
        guesses: Tensor,
        choices: Tensor,
        position: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        assumed: int,
    ) -> None:
        """The same behind those guesses that are right, which the host need not know."""

    def advance(self) -> None:
        """Run the current token and choose the next, without waiting for either."""

    def chosen(self, position: int) -> int:
        """The token chosen after the one at `position`, one of the last two; waits for it.

        Negative where the logits are not finite.
        """

    @property
    def next_token(self) -> Tensor:
        """[1] int32 on the device: what the last `advance` chose."""

    def take_back(self, position: int) -> None:
        """Uncount what ran from `position` on, if anything; `start` comes before the next."""


def step_tensors(decoder: Decoder, cache: KVCache) -> StepTensors:
    """What a fused step of the decoder is bound to."""
    config, weights = decoder.config, decoder.weights
    cos, sin = decoder.rotary.tables(cache.length)
    scales = torch.full((cache.length,), config.attention_scale, device=decoder.device)
    if (growth := decoder.rotary.query_growth(0, cache.length)) is not None:
        scales *= growth
    return StepTensors(
        layers=weights.layers,
        embed_tokens=weights.embed_tokens,
        norm=weights.norm,
        lm_head=weights.lm_head,
        keys=cache.keys,
        values=cache.values,
        cos=cos,
        sin=sin,
        query_scales=scales,
        num_attention_heads=config.num_attention_heads,
        rms_norm_eps=config.rms_norm_eps,
        sliding_windows=config.sliding_windows,
        rotary_dims=config.rotary_dims,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_multiplier=1 / config.logits_scaling,
    )


class DecoderPrefill:
    """Reads several tokens with the plain decoder, in torch."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache

    def layers(self, hidden: Tensor, position: int, first: int, last: int) -> Tensor:
        for index in range(first, last):
            hidden = self._decoder.layer(index, hidden, cache=self._cache, position=position)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(self._decoder.final_norm(hidden))

    def read(self, tokens: Sequence[int], position: int) -> Tensor:
        hidden = self._decoder.embed(torch.tensor(tokens))
        layers = self._decoder.config.num_hidden_layers
        return self.logits(self.layers(hidden, position, 0, layers))


class DecoderStep:
    """Decodes with the plain decoder, in torch."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self.set_thresholds(None)
        self.set_vectors(None)

    def set_vectors(self, vectors: RecoveryVectors | None) -> None:
        self._vectors = vectors

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        self._thresholds = None if thresholds is None else thresholds.to(self._decoder.device)
        self._count = SkipCount(self._decoder, thresholds)

    def __call__(self, token: int, position: int) -> Tensor:
        hidden = self._decoder.forward(
            torch.tensor([token]),
            cache=self._cache,
            position=position,
            thresholds=self._thresholds,
            vectors=self._vectors,
            observe=self._count.observer(),
        )
        return self._decoder.logits(hidden)[0]

    @property
    def kept(self) -> Tensor:
        return self._count.skips().kept

    def clear_counts(self) -> None:
        self._count.clear()
