"""Several tokens at once, dense: what a session asks for where guesses are to be checked."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teal_cli.errors import whole
from teal_cli.faults import is_out_of_memory
from teal_cli.inference.pace import LENGTHS
from teal_cli.inference.sampling import Sampler, not_finite
from teal_cli.inference.step import Prefill, step_tensors
from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter

if TYPE_CHECKING:
    from teal_kernels.gpu import RowChoices, VerifyStep


class Verification:
    """Passes over several tokens, with the kernels of a GPU or with the decoder.

    Kernels and buffers are made when they are first needed: only drafts need them.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        prefill: Prefill,
        reporter: Reporter,
        *,
        on_device: bool,
    ) -> None:
        """Bind to a model and a cache.

        Args:
            decoder: the model.
            cache: where keys and values are written.
            prefill: reads several tokens where no GPU does.
            reporter: told when the kernels cannot be used.
            on_device: whether a GPU's kernels compute, and choose tokens.
        """
        self._decoder = decoder
        self._cache = cache
        self._prefill = prefill
        self._reporter = reporter
        self._on_device = on_device

    def logits(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [T, vocab_size] float32 after each of T tokens, the first one at `position`."""
        if self._on_device and self._kernels is not None:
            return self._kernels(tokens, position)
        hidden = self._decoder.embed(torch.tensor(tokens))
        layers = self._decoder.config.num_hidden_layers
        return self._prefill.logits(self._prefill.layers(hidden, position, 0, layers))

    def choices(
        self, tokens: Sequence[int], before: Sequence[int], sampler: Sampler, seed: int
    ) -> list[int] | None:
        """What is chosen after each of T tokens that follow those `before`.

        None where the host chooses; otherwise as a step of the device does with this seed.

        Raises:
            TealError: the logits are not finite.
        """
        if not self._on_device or sampler.needs_logits:
            return None
        sampling, position = sampler.sampling, len(before)
        found = self._chooser.choose(
            self.logits(tokens, position),
            position,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            tokens=[*before, tokens[0]],
        )
        if min(found) < 0:
            raise not_finite()
        return found

    @cached_property
    def _kernels(self) -> VerifyStep | None:
        try:
            module = importlib.import_module("teal_kernels.gpu")
            kernels: VerifyStep = module.VerifyStep(step_tensors(self._decoder, self._cache))
            return kernels
        except Exception as error:  # a broken Triton fails in any way it likes
            if is_out_of_memory(error):
                raise
            self._reporter.note(
                f"the compiled kernels for several tokens cannot be used here ({whole(error)}); "
                "guesses are checked in plain torch, which takes longer"
            )
            return None

    @cached_property
    def _chooser(self) -> RowChoices:
        from teal_kernels.gpu import RowChoices

        vocab, most = self._decoder.config.vocab_size, LENGTHS[-1] + 1
        return RowChoices(vocab, self._cache.length, self._decoder.device, most=most)
