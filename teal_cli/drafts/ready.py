"""What `--draft` names, made ready to guess tokens for a dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from teal_kernels.quantized import QuantizedRows
from torch import Tensor

from teal_cli import pipeline
from teal_cli.benchmark.cost import cache_bytes, require_memory, token_bytes, weight_bytes
from teal_cli.drafts.names import Wanted
from teal_cli.drafts.pairs import check_sizes, check_vocabularies
from teal_cli.drafts.preview import preview
from teal_cli.environment import available_memory
from teal_cli.errors import UsageError
from teal_cli.inference.defaults import chat_defaults
from teal_cli.inference.drafters import Drafter, Lookup, ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization, quantization
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.store import models
from teal_cli.store.models import ModelRef

# Forms of the model that may guess for it, the quickest first.
_FORMS = ("int4-128+head", "int4+head", "int4-128", "int4", "int8+head", "int8")
LESS_MEMORY = "--draft lookup takes none; integer weights take less."


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What guesses for one model: its checkpoint and sparsity where it is a model."""

    wanted: Wanted
    sparsity: float
    profile: Callable[[], Profile]
    load: Callable[[Decoder], Decoder]  # from the decoder that it guesses for

    def setting(self, method: str | None = None, *, recover: bool = True) -> Setting:
        """How sparse the guesses are."""
        if not self.sparsity:
            return DENSE
        return self.profile().setting(self.sparsity, method, recover=recover)

    @property
    def label(self) -> str:
        """As tables name it."""
        named = self.wanted.name
        if self.wanted.model is None:
            return named
        return f"{named} {self.sparsity:.4g}" if self.sparsity else f"{named} dense"

    def attach(
        self,
        session: Session,
        setting: Setting | Callable[[Session], Setting],
        *,
        acceptance: float | None = None,
        reporter: Reporter,
    ) -> None:
        """Let it guess for a session, which is still empty.

        Args:
            session: of the dense model.
            setting: how sparse the guesses are, or what finds it by the session that guesses.
            acceptance: what to assume of them, where weights are random.
            reporter: told what the guesser's own session has to say.
        """
        drafters: list[Drafter] = []
        if self.wanted.lookup:
            # Text of random weights never repeats; where nobody else does, this guesses all of it.
            assumed = acceptance is not None and self.wanted.model is None
            drafters.append(Lookup(everywhere=assumed))
        if self.wanted.model is not None:
            decoder = self.load(session.decoder)
            shared = self.wanted.is_self
            own = Session(
                decoder,
                max_length=min(session.max_length, decoder.config.context_length),
                cache=session.cache if shared else None,
                deterministic=session.deterministic,
                reporter=reporter,
            )
            own.use(setting if isinstance(setting, Setting) else setting(own))
            vocab_size = session.decoder.config.vocab_size
            name, kind = self.wanted.model_name, decoder.weights.quantization
            if kind is not None and not self.wanted.quantize and decoder is not session.decoder:
                name = f"{name}:{kind.name}"  # a form of it that was found
            drafters.append(ModelDrafter(name, own, vocab_size, shares_cache=shared))
        session.drafting = Drafting(drafters, acceptance=acceptance)
        session.drafting.warm_up(session)


def prepare(
    wanted: Wanted,
    ref: ModelRef,
    checkpoint: Checkpoint,
    sparsity: float | None,
    *,
    context: int,
    on: torch.device,
    quick: bool = True,
    reporter: Reporter,
    **where: Any,
) -> Draft:
    """Make what `--draft` names, as far as it is not there.

    Args:
        wanted: what it names.
        ref: the model that it guesses for.
        checkpoint: the same, converted.
        sparsity: of the guesses; None is a usual one.
        context: positions that both need room for.
        on: the device of both.
        quick: thresholds that are made in a hurry will do.
        reporter: follows what takes long.
        where: `device`, `offline` and `token` for what is downloaded and made.

    Raises:
        UsageError: it cannot guess for this model.
        TealError: there is no memory for it.
    """
    if wanted.model is None:
        return Draft(wanted, 0.0, _no_profile, lambda decoder: decoder)
    room = _Room(checkpoint, context, available_memory(on))
    own = (_form if wanted.is_self else _model)(wanted, ref, room, reporter, where)
    if sparsity is None:
        sparsity = chat_defaults(own.config).sparsity
    if own.folder == checkpoint.folder and not sparsity:
        raise UsageError(
            f"--draft {wanted.model_name} with sparsity 0 guesses with what checks: nothing would"
            " be faster",
            hint="Give it a --sparsity, or smaller integers than those that check.",
        )

    @cache
    def profile() -> Profile:
        return pipeline.ensure_profile(
            own,
            quick=quick,
            device=where["device"],
            offline=where["offline"],
            reporter=reporter,
        )

    if sparsity:
        profile()  # made before the weights take up memory

    @cache
    def load(decoder: Decoder) -> Decoder:
        guessing = decoder if own.folder == checkpoint.folder else own.load(decoder.device)
        return with_quick_head(guessing) if decoder.device.type == "cuda" else guessing

    return Draft(wanted, sparsity, profile, load)


def with_quick_head(decoder: Decoder) -> Decoder:
    """The same decoder with its lm_head as int8, where memory allows.

    It takes half as long to read, and what guesses need not be exact.
    """
    head = decoder.weights.lm_head
    room = available_memory(decoder.device)
    # Parts of it and the whole stand side by side for a moment.
    if isinstance(head, Tensor) and (room is None or 2 * head.numel() < room):
        weights = replace(decoder.weights, lm_head=QuantizedRows.int8(head))
        return Decoder(decoder.config, weights, compute_dtype=decoder.compute_dtype)
    return decoder


@dataclass(frozen=True, slots=True)
class _Room:
    """Memory for a model and what guesses for it."""

    checkpoint: Checkpoint  # of the model
    context: int
    available: int | None  # bytes; None where nobody knows

    def needed(self, nbytes: int) -> int:
        """Bytes of the model, its cache, and so many more."""
        config, itemsize = self.checkpoint.config, self.checkpoint.dtype.itemsize
        return self.checkpoint.nbytes + cache_bytes(config, itemsize, self.context) + nbytes

    def holds(self, nbytes: int) -> bool:
        """Whether so many bytes more fit."""
        return self.available is None or self.needed(nbytes) <= self.available

    def require(self, nbytes: int, what: str) -> None:
        """Make sure that what guesses fits.

        Raises:
            TealError: it does not.
        """
        require_memory(
            self.needed(nbytes),
            self.available,
            f"{self.checkpoint.name} with {what} to guess for it",
            hint=LESS_MEMORY,
        )


def _form(
    wanted: Wanted, ref: ModelRef, room: _Room, reporter: Reporter, where: dict[str, Any]
) -> Checkpoint:
    """The form of the model itself that guesses: the one asked for, else the quickest here."""
    checkpoint = room.checkpoint
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    kind = quantization(wanted.quantize)
    most = _read_bytes(checkpoint, checkpoint.quantization)
    if kind is None:
        stored = (pipeline.stored_checkpoint(ref, dtype, form) for form in _FORMS)
        quicker = (f for f in stored if f and _read_bytes(checkpoint, f.quantization) < most)
        found = next((form for form in quicker if room.holds(form.nbytes)), checkpoint)
        if found is not checkpoint:
            reporter.note(f"{found.folder.name} is here and guesses: --draft self")
        return found
    if kind == checkpoint.quantization:
        return checkpoint
    if (read := _read_bytes(checkpoint, kind)) > most:
        raise UsageError(
            f"--draft {wanted.model_name} reads {read / 1e6:,.1f} MB a token, and what checks"
            f" {most / 1e6:,.1f} MB: what guesses has to be the smaller one",
            hint="--draft self guesses with the same weights, sparse.",
        )
    nbytes = weight_bytes(checkpoint.config, checkpoint.dtype.itemsize, kind)
    room.require(nbytes, f"{kind.name} of it")
    return pipeline.ensure_checkpoint(
        ref, dtype=dtype, quantize=wanted.quantize, reporter=reporter, **where
    )


def _read_bytes(checkpoint: Checkpoint, kind: Quantization | None) -> int:
    """Bytes that a dense token of a model's form reads."""
    return token_bytes(checkpoint.config, itemsize=checkpoint.dtype.itemsize, kind=kind).total


def _model(
    wanted: Wanted, ref: ModelRef, room: _Room, reporter: Reporter, where: dict[str, Any]
) -> Checkpoint:
    """Another model that guesses: seen to go with the one that checks, then made."""
    checkpoint, own_ref = room.checkpoint, models.resolve(wanted.model)
    seen = preview(
        own_ref,
        wanted.quantize,
        token=where["token"],
        offline=where["offline"],
        reporter=reporter,
    )
    check_sizes(seen.config, checkpoint.config, own_ref.name, checkpoint.name)
    check_vocabularies(seen.tokenizer, checkpoint.tokenizer(), own_ref.name, checkpoint.name)
    context, itemsize = min(room.context, seen.config.context_length), seen.dtype.itemsize
    nbytes = weight_bytes(seen.config, itemsize, quantization(wanted.quantize))
    nbytes += cache_bytes(seen.config, itemsize, context)
    room.require(nbytes, wanted.model_name)
    own = pipeline.ensure_checkpoint(own_ref, quantize=wanted.quantize, reporter=reporter, **where)
    models.remember(ref)  # the last model that was used, not what guesses for it
    return own


def _no_profile() -> Profile:
    raise UsageError("text that is looked up has no sparsity")
