"""A session: one sequence on one decoder, prefilled at once and then decoded token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.inference.guesses import Guesser, Guesses
from teal_cli.inference.kernels import FUSED_STEPS, Backend, choose_kernels
from teal_cli.inference.pace import LENGTHS
from teal_cli.inference.sampling import Sampler, at_position, not_finite
from teal_cli.inference.step import ChoosingStep, DecoderStep
from teal_cli.inference.verification import Verification
from teal_cli.model.cache import KVCache
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter, Silent, Task
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.sparsity.shape import ModelShape
from teal_cli.sparsity.skips import Skips

# Positions that prefill takes at a time. A CPU's attention may hold the scores, near 1 GB at 32
# heads and 8192 positions; a GPU's does not, and there the layers' widest activations count.
_PREFILL_CHUNK = {"cpu": 1024, "cuda": 2048}

# Tokens times layers between two questions whether to go on: under a second on two slow cores.
_STRETCH = 256

# Tokens of a pass over a few.
_AT_ONCE = LENGTHS[-1] + 1


class Interrupted(Exception):
    """A prefill was asked to stop; the session keeps the chunks that were done."""


class Session:
    """One sequence: its tokens so far, their keys and values, and the setting in force.

    Prefill is dense and exact; the thresholds apply to tokens that are decoded one by one. With
    `drafting`, which a dense session can have, `generate` lets it guess tokens.
    """

    drafting: Guesser | None = None

    def __init__(
        self,
        decoder: Decoder,
        *,
        max_length: int,
        setting: Setting = DENSE,
        backend: Backend = "auto",
        deterministic: bool = False,
        cache: KVCache | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """Allocate the cache and choose how tokens are decoded.

        Args:
            decoder: the model.
            max_length: positions to make room for.
            setting: how sparse tokens are decoded.
            backend: "auto" takes the fastest for the decoder's device; "reference" the decoder.
            deterministic: the same sums in every run on CUDA, to the last bit; a CPU's always
                are, for a given number of threads.
            cache: the one of another session, which is then shared: both write into it.
            reporter: told when the fast kernels cannot be used.

        Raises:
            UsageError: `max_length` is beyond the model's context.
        """
        self.decoder = decoder
        self.cache = cache or decoder.new_cache(max_length)
        self.deterministic = deterministic or decoder.device.type == "cpu"
        self.tokens: list[int] = []
        self._steps = 0
        self._step, self._prefill = choose_kernels(
            decoder, self.cache, backend, deterministic, reporter or Silent()
        )
        self._verification = Verification(
            decoder, self.cache, self._prefill, reporter or Silent(), on_device=self.decodes_ahead
        )
        if decoder.device.type == "cuda" and self.decodes_ahead:
            self._verification.warm_up()
        self.use(setting)

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
        if isinstance(self._step, DecoderStep):
            return "torch"
        return FUSED_STEPS[self.decoder.device.type][1]

    @property
    def decodes_ahead(self) -> bool:
        """Whether the device chooses tokens itself, ahead of the host."""
        return isinstance(self._step, ChoosingStep)

    def use(self, setting: Setting) -> None:
        """Decode under another setting from the next token on.

        Its thresholds decide what is computed, its target which form of the kernels does it.
        """
        layers = self.decoder.config.num_hidden_layers
        if setting.thresholds is not None and len(setting.thresholds) != layers:
            raise ValueError(f"thresholds of {len(setting.thresholds)} layers, not {layers}")
        self.setting = setting
        self._step.set_vectors(setting.vectors)
        self._step.set_thresholds(setting.thresholds)
        if isinstance(self._step, ChoosingStep):
            self._step.expect(setting.target_sparsity)
        self.clear_counts()

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[int] | Tensor,
        interrupted: Callable[[], bool] = lambda: False,
        reporter: Reporter | None = None,
    ) -> Tensor:
        """Append tokens [T], computed dense; return the logits [vocab_size] after the last.

        Args:
            tokens: at least one.
            interrupted: asked before a few layers of each chunk.
            reporter: follows the chunks, where there are several.

        Raises:
            UsageError: they do not fit into the context; nothing has been appended then.
            Interrupted: `interrupted` said True.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
        if not len(ids):
            raise ValueError("prefill needs at least one token")
        if self.position + len(ids) > self.max_length:
            raise UsageError(
                f"{self.position + len(ids)} tokens do not fit into a context of {self.max_length}",
                hint="Shorten the text, or choose a longer context.",
            )
        if len(ids) <= self._verification.short_prompt:
            for few in ids.split(_AT_ONCE):
                if interrupted():
                    raise Interrupted
                logits = self._verification.logits(few.tolist(), self.position)
                self.tokens += few.tolist()
            return logits[-1]
        chunks = ids.split(_PREFILL_CHUNK[self.decoder.device.type])
        follower = (reporter if len(chunks) > 1 else None) or Silent()
        with follower.task("Reading", len(ids), "tokens") as task:
            for chunk in chunks:
                hidden = self._prefill_chunk(chunk, interrupted, task)
        return self._prefill.logits(hidden[-1:])[0]

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Logits [T, vocab_size] float32 after each of T tokens that may follow, computed dense.

        Their keys and values are cached at the positions that follow, and nothing is appended:
        `accept` appends those that are right, and what is written next replaces the others.
        """
        if len(tokens) == 1:
            self._steps += 1
            return self._step(tokens[0], self.position)[None]
        return self._verification.logits(tokens, self.position)

    def choices(
        self,
        token: int,
        guesses: Guesses,
        sampler: Sampler,
        seed: int,
        meanwhile: Callable[[Tensor], None] = lambda chosen: None,
    ) -> tuple[list[int], list[int]] | None:
        """What is chosen after `token` and each of the guesses that may follow it, behind these.

        As `verify` otherwise; each is the choice that `decode` makes, if the tokens before are.
        None where the host chooses.

        Args:
            token: it follows the session's.
            guesses: n tokens that may follow it.
            sampler: how to choose.
            seed: with the position it makes each choice's noise.
            meanwhile: called before the host waits, with the choices [n + 1] int32 as the device
                will have them; not called where the host chooses.

        Raises:
            TealError: the logits are not finite.
        """
        return self._verification.choices(token, guesses, self.tokens, sampler, seed, meanwhile)

    def accept(self, token: int) -> None:
        """Append a token that `verify` has computed."""
        self.tokens.append(token)

    def _prefill_chunk(self, chunk: Tensor, interrupted: Callable[[], bool], task: Task) -> Tensor:
        """Append tokens [T]; return what the last layer gives, [T, hidden_size]."""
        hidden = self.decoder.embed(chunk)
        layers = self.decoder.config.num_hidden_layers
        stride = max(1, _STRETCH // len(chunk))
        for first in range(0, layers, stride):
            if interrupted():
                raise Interrupted
            last = min(first + stride, layers)
            hidden = self._prefill.layers(hidden, self.position, first, last)
            # So many tokens' worth of work is done, after a part of the layers for all of them.
            task.advance(len(chunk) * last // layers - len(chunk) * first // layers)
        self.tokens += chunk.tolist()
        return hidden

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

    def decode(
        self, token: int, sampler: Sampler, most: int, seed: int | None = None
    ) -> Generator[int, None, None]:
        """Append `token`, then each token chosen after it; yield every choice as it falls.

        A step that can choose runs a token ahead of the one that is yielded, so the iterator is
        to be closed before the session is used for anything else.

        Args:
            token: in the sequence's next position.
            sampler: how to choose.
            most: choices to make; fewer where the context ends.
            seed: with the position it makes each choice's noise; None is one that the sampler
                draws.

        Yields:
            The token that follows those appended so far; it is not appended itself yet.

        Raises:
            TealError: the logits are not finite.
        """
        end = min(self.position + most, self.max_length)
        seed = sampler.draw_seed() if seed is None else seed
        if isinstance(self._step, ChoosingStep) and not sampler.needs_logits:
            yield from self._decode_ahead(self._step, token, sampler, end, seed)
            return
        while self.position < end:
            logits = self.step(token)
            token = sampler.sample(logits, self.tokens, at_position(seed, self.position))
            yield token

    def _decode_ahead(
        self, step: ChoosingStep, token: int, sampler: Sampler, end: int, seed: int
    ) -> Generator[int, None, None]:
        """The steps to position `end`, each begun before the choice of the last one is read."""
        if self.position >= end:
            return
        step.start(
            token, self.position, **sampler.sampling.on_device, seed=seed, tokens=self.tokens
        )
        try:
            step.advance()
            while self.position < end:
                if self.position + 1 < end:
                    step.advance()
                chosen = step.chosen(self.position)
                if chosen < 0:
                    raise not_finite()
                self.tokens.append(token)
                self._steps += 1
                token = chosen
                yield token
        finally:
            step.take_back(self.position)

    def guess(self, token: int, sampler: Sampler, most: int, seed: int) -> Tensor:
        """What `decode` would yield, [most] int32, as the device will have it: nobody waits.

        Nothing is appended. It is for a session that decodes ahead, and where the sampler needs no
        logits and the context does not end; what follows logits that are not finite is token 0.
        """
        step = self._step
        assert isinstance(step, ChoosingStep)
        step.start(
            token, self.position, **sampler.sampling.on_device, seed=seed, tokens=self.tokens
        )
        return self._guesses(step, most)

    def guess_on(
        self,
        guesses: Tensor,
        choices: Tensor,
        sampler: Sampler,
        most: int,
        seed: int,
        assumed: int = -1,
    ) -> Tensor:
        """What `guess` gives behind those guesses that are right, which the host need not know.

        The sampler has no repetition penalty; else as `guess`.

        Args:
            guesses: [n] int32, what may follow the token behind the session's.
            choices: [n + 1] int32, what is chosen after that token and each guess.
            sampler: how to choose.
            most: tokens to guess.
            seed: with the position it makes each choice's noise.
            assumed: a bit for each guess, whether it counts as right whatever was chosen; -1
                assumes nothing.
        """
        step = self._step
        assert isinstance(step, ChoosingStep)
        settings = sampler.sampling.on_device
        assert settings.pop("repetition_penalty") == 1
        step.follow(guesses, choices, self.position, **settings, seed=seed, assumed=assumed)
        return self._guesses(step, most)

    def _guesses(self, step: ChoosingStep, most: int) -> Tensor:
        guesses = torch.empty(most, dtype=torch.int32, device=self.decoder.device)
        for i in range(most):
            step.advance()
            self._steps += 1
            guesses[i : i + 1].copy_(step.next_token)
        return guesses

    def append_cached(self, tokens: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Append tokens whose keys and values are known, as `cache.read` gave them."""
        self.cache.write_back(self.position, keys, values)
        self.tokens += tokens

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on."""
        del self.tokens[position:]

    def reset(self) -> None:
        """Forget every token and count."""
        self.rewind(0)
        self.clear_counts()

    def clear_counts(self) -> None:
        """Let `skips` and `realised_sparsity` start anew."""
        self._steps = 0
        self._step.clear_counts()

    def skips(self) -> Skips | None:
        """What the steps since the counts were cleared skipped; None if they are dense or none."""
        if self.setting.thresholds is None or not self._steps:
            return None
        return Skips(ModelShape.of(self.decoder.config), self._step.kept, self._steps)

    def realised_sparsity(self) -> float | None:
        """Share of the projections' weights that the same steps skipped."""
        skips = self.skips()
        return None if skips is None else skips.realised_sparsity


def common_prefix(seen: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shorter = min(len(seen), len(wanted))
    # They mostly part near the end, if at all, and slices compare a hundred times as fast.
    length = max(shorter - 16, 0)
    if seen[:length] != wanted[:length]:
        length = 0
    while length < shorter and seen[length] == wanted[length]:
        length += 1
    return length
