"""A session: one sequence on one decoder, prefilled at once and then decoded token by token."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS, SITE_OF
from teal_cli.progress import Reporter, Silent

Backend = Literal["auto", "reference"]

# Positions that prefill takes at a time, so that attention's scores stay near 1 GB at 32 heads
# and 8192 positions of context.
_PREFILL_CHUNK = 1024


class _Step(Protocol):
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


class _DecoderStep:
    """Decodes with the plain decoder: on CUDA through the sparse kernel, on a CPU in torch."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._thresholds: Tensor | None = None
        shape = (decoder.config.num_hidden_layers, len(PROJECTIONS))
        self._kept = torch.zeros(shape, dtype=torch.int64, device=decoder.device)

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        self._thresholds = None if thresholds is None else thresholds.to(self._decoder.device)

    def __call__(self, token: int, position: int) -> Tensor:
        hidden = self._decoder.forward(
            torch.tensor([token]),
            cache=self._cache,
            position=position,
            thresholds=self._thresholds,
            observe=None if self._thresholds is None else self._count,
        )
        return self._decoder.logits(hidden)[0]

    @property
    def kept(self) -> Tensor:
        return self._kept.cpu()

    def clear_counts(self) -> None:
        self._kept.zero_()

    def _count(self, layer: int, site: str, x: Tensor) -> None:
        assert self._thresholds is not None
        columns = [i for i, name in enumerate(PROJECTIONS) if SITE_OF[name] == site]
        levels = self._thresholds[layer, columns[0] : columns[-1] + 1]
        kept = (x.abs().float() > levels[:, None]).sum(-1)
        self._kept[layer, columns[0] : columns[-1] + 1] += kept


class Session:
    """One sequence: its tokens so far, their keys and values, and the thresholds in force.

    Prefill is dense and exact; the thresholds apply to tokens that are decoded one by one.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_length: int,
        thresholds: Tensor | None = None,
        backend: Backend = "auto",
        reporter: Reporter | None = None,
    ) -> None:
        """Allocate the cache and choose how tokens are decoded.

        Args:
            decoder: the model.
            max_length: positions to make room for.
            thresholds: as `set_thresholds` takes them.
            backend: "auto" takes the fastest for the decoder's device; "reference" the decoder.
            reporter: told when the fast kernels cannot be used.

        Raises:
            UsageError: `max_length` is beyond the model's context.
        """
        self.decoder = decoder
        self.cache = decoder.new_cache(max_length)
        self.tokens: list[int] = []
        self._steps = 0
        self._step = _choose_step(decoder, self.cache, backend, reporter or Silent())
        self.thresholds: Tensor | None = None
        self.set_thresholds(thresholds)

    @property
    def position(self) -> int:
        """Tokens in the sequence so far; the next one gets this position."""
        return len(self.tokens)

    @property
    def max_length(self) -> int:
        """Positions that there is room for."""
        return self.cache.length

    @property
    def backend(self) -> str:
        """What decodes: "numba", "triton" or "torch"."""
        if self.decoder.device.type == "cuda":
            return "triton"
        return "torch" if isinstance(self._step, _DecoderStep) else "numba"

    def set_thresholds(self, thresholds: Tensor | None) -> None:
        """Use other thresholds [num_hidden_layers, 7] from the next token on; None is dense."""
        if thresholds is not None:
            expected = (self.decoder.config.num_hidden_layers, len(PROJECTIONS))
            if tuple(thresholds.shape) != expected:
                raise ValueError(f"thresholds {tuple(thresholds.shape)}, expected {expected}")
            thresholds = thresholds.to(torch.float32).contiguous()
        self.thresholds = thresholds
        self._step.set_thresholds(thresholds)
        self.clear_counts()

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens [T], computed dense; return the logits [vocab_size] after the last.

        Raises:
            UsageError: they do not fit into the context; nothing has been appended then.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
        if not len(ids):
            raise ValueError("prefill needs at least one token")
        if self.position + len(ids) > self.max_length:
            raise UsageError(
                f"{self.position + len(ids)} tokens do not fit into a context of {self.max_length}",
                hint="Shorten the text, or choose a longer context.",
            )
        for chunk in ids.split(_PREFILL_CHUNK):
            hidden = self.decoder.forward(chunk, cache=self.cache, position=self.position)
            self.tokens += chunk.tolist()
        return self.decoder.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append one token, computed sparse; return the logits [vocab_size] after it.

        Raises:
            UsageError: the context is full.
        """
        if self.position >= self.max_length:
            raise UsageError(f"the context is full: it holds {self.max_length} tokens")
        logits = self._step(token, self.position)
        self.tokens.append(token)
        self._steps += 1
        return logits

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        del self.tokens[position:]

    def reset(self) -> None:
        """Forget every token and count."""
        self.rewind(0)
        self.clear_counts()

    def clear_counts(self) -> None:
        """Let `kept_shares` and `realised_sparsity` start anew."""
        self._steps = 0
        self._step.clear_counts()

    def kept_shares(self) -> Tensor | None:
        """Share of channels kept by each projection, [num_hidden_layers, 7] float64.

        Over the steps since the counts were cleared; None without thresholds or before a step.
        """
        if self.thresholds is None or not self._steps:
            return None
        inputs = [shape[0] for shape in self.decoder.config.projection_shapes.values()]
        return self._step.kept.double() / (self._steps * torch.tensor(inputs))

    def realised_sparsity(self) -> float | None:
        """Share of the projections' weights that were skipped, over the same steps."""
        kept = self.kept_shares()
        if kept is None:
            return None
        shapes = self.decoder.config.projection_shapes.values()
        weights = torch.tensor([inputs * outputs for inputs, outputs in shapes]).double()
        return 1 - float((kept.mean(0) * weights).sum() / weights.sum())


def _choose_step(decoder: Decoder, cache: KVCache, backend: Backend, reporter: Reporter) -> _Step:
    """The fused step of the decoder's device where it can be had, the decoder itself otherwise."""
    if backend == "auto":
        try:
            return _fused_step(decoder, cache)
        except Exception as error:  # a broken numba, Triton or LLVM fails in any way it likes
            reporter.note(
                f"the compiled kernels cannot be used here ({error}); decoding in plain "
                "torch, which sparsity does not make faster"
            )
    return _DecoderStep(decoder, cache)


def _fused_step(decoder: Decoder, cache: KVCache) -> _Step:
    module = importlib.import_module(
        "teal_kernels.gpu" if decoder.device.type == "cuda" else "teal_kernels.cpu"
    )
    config, weights = decoder.config, decoder.weights
    cos, sin = decoder.rotary.tables(cache.length)
    step: _Step = module.DecodeStep(
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
    step(0, 0)  # compiles, or shows that it cannot; the prompt overwrites what it caches
    return step
