"""Several tokens at once, dense: what a session asks for where guesses are to be checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teal_cli.errors import whole
from teal_cli.faults import is_out_of_memory
from teal_cli.inference.guesses import Guesses, known
from teal_cli.inference.pace import LENGTHS
from teal_cli.inference.sampling import Sampler, not_finite
from teal_cli.inference.step import Prefill, step_tensors
from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter

if TYPE_CHECKING:
    from teal_kernels.gpu import RowChoices, VerifyStep

# Tokens of a prompt that passes over a few at a time read sooner than prefill, on an H100: that
# takes as long for any few, in float16 as long as four passes and with integers as five and more.
_SHORT_PROMPT = 3 * (LENGTHS[-1] + 1)


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

    def warm_up(self) -> None:
        """Compile and capture a pass, or see that it cannot be; the cache is still empty."""
        try:
            self.logits([0], 0)
        except Exception as error:
            self._give_up(error)
            self._kernels = None

    @property
    def short_prompt(self) -> int:
        """Tokens that passes read sooner than prefill does, at most."""
        return _SHORT_PROMPT if self._on_device and self._kernels is not None else 0

    def logits(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [T, vocab_size] float32 after each of T tokens, the first one at `position`."""
        if self._on_device and self._kernels is not None:
            return self._kernels(tokens, position)
        return self._prefill.read(tokens, position)

    def choices(
        self,
        token: int,
        guesses: Guesses,
        before: Sequence[int],
        sampler: Sampler,
        seed: int,
        meanwhile: Callable[[Tensor], None],
    ) -> tuple[list[int], list[int]] | None:
        """Guesses as the host knows them now, and what is chosen after `token` and each of them.

        None where the host chooses; otherwise as a step of the device does with this seed. The
        host waits once, for both.

        Args:
            token: it follows those `before`.
            guesses: what may follow it.
            before: the sequence.
            sampler: how to choose.
            seed: with the position it makes each choice's noise.
            meanwhile: as in `Session.choices`.

        Raises:
            TealError: the logits are not finite.
        """
        if not self._on_device or sampler.needs_logits:
            return None
        position, said = len(before), guesses
        if isinstance(guesses, Tensor):
            said = guesses.to("cpu", non_blocking=True)  # there when the choices are
        self._launch(token, guesses, position)
        found = self._chooser.choose(
            1 + len(guesses),
            position,
            **sampler.sampling.on_device,
            seed=seed,
            tokens=[*before, token],
            meanwhile=meanwhile,
        )
        if min(found) < 0:
            raise not_finite()
        return known(said), found

    def _launch(self, token: int, guesses: Guesses, position: int) -> None:
        """Have the logits where `_chooser` finds them; nobody waits for them."""
        if self._kernels is None:
            rows = self.logits([token, *known(guesses)], position)
            self._chooser.logits[: len(rows)].copy_(rows)
        elif isinstance(guesses, Tensor):
            self._kernels.run([token], position, guesses)
        else:
            self._kernels.run([token, *guesses], position)

    @cached_property
    def _kernels(self) -> VerifyStep | None:
        try:
            module = importlib.import_module("teal_kernels.gpu")
            with torch.inference_mode(False):  # buffers that are written in any mode
                kernels: VerifyStep = module.VerifyStep(step_tensors(self._decoder, self._cache))
            return kernels
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        """Say so where a broken Triton fails, in any way it likes; raise what memory is lacking."""
        if is_out_of_memory(error):
            raise error
        self._reporter.note(
            f"the compiled kernels for several tokens cannot be used here ({whole(error)}); "
            "guesses are checked in plain torch, which takes longer"
        )

    @cached_property
    def _chooser(self) -> RowChoices:
        from teal_kernels.gpu import RowChoices

        if self._kernels is not None:
            return RowChoices(self._kernels.logits, self._cache.length)
        rows = torch.zeros(LENGTHS[-1] + 1, self._decoder.config.vocab_size)
        return RowChoices(rows.to(self._decoder.device), self._cache.length)
