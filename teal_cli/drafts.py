"""What `--draft` names, made ready: what guesses tokens for a dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from teal_cli import pipeline
from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.cost import cache_bytes, require_memory, weight_bytes
from teal_cli.benchmark.self_calibration import met_setting, self_calibrated
from teal_cli.benchmark.subject import Subject, random_model
from teal_cli.environment import available_memory
from teal_cli.errors import UsageError
from teal_cli.inference.defaults import chat_defaults
from teal_cli.inference.drafters import Drafter, Lookup, ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS, quantization
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.store import models
from teal_cli.store.models import ModelRef

# Forms of the model that may guess for it, the quickest first.
_FORMS = ("int4-128+head", "int4+head", "int4-128", "int4", "int8+head", "int8")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `--draft` asks for; `model` is "self" or a model's name."""

    lookup: bool
    model: str | None
    quantize: str | None

    @property
    def name(self) -> str:
        """What was asked for."""
        return ",".join(filter(None, ("lookup" if self.lookup else "", self.model_name)))

    @property
    def model_name(self) -> str:
        """The part of it that is a model; empty without one."""
        return ":".join(filter(None, (self.model, self.quantize)))

    @staticmethod
    def parse(text: str) -> Wanted:
        """What a list such as "lookup,self:int8" means.

        Raises:
            UsageError: it names nothing, more than one model, or a form of it that is none.
        """
        entries = tuple(dict.fromkeys(e.strip() for e in text.split(",") if e.strip()))
        named = [entry for entry in entries if entry != "lookup"]
        if not entries:
            raise UsageError("--draft names nothing", hint="Say lookup, self or a model.")
        if len(named) > 1:
            raise UsageError(
                f"--draft takes one model, not {' and '.join(named)}",
                hint="lookup goes with any of them, as in lookup,self.",
            )
        if not named:
            return Wanted(True, None, None)
        name, colon, form = named[0].rpartition(":")
        if colon and (form in QUANTIZATIONS or name == "self"):
            quantization(form)  # or it is refused by its name
            return Wanted("lookup" in entries, name, form)
        return Wanted("lookup" in entries, named[0], None)


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """What guesses for one model: its checkpoint and sparsity where it is a model."""

    wanted: Wanted
    sparsity: float
    profile: Callable[[], Profile]
    load: Callable[[Decoder], Decoder]  # from the decoder that it guesses for

    def setting(self, method: str | None = None) -> Setting:
        """How sparse the guesses are."""
        return self.profile().setting(self.sparsity, method) if self.sparsity else DENSE

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
            shared = self.wanted.model == "self"
            own = Session(
                decoder,
                max_length=min(session.max_length, decoder.config.context_length),
                cache=session.cache if shared else None,
                deterministic=session.deterministic,
                reporter=reporter,
            )
            own.use(setting if isinstance(setting, Setting) else setting(own))
            vocab_size = session.decoder.config.vocab_size
            drafters.append(
                ModelDrafter(self.wanted.model_name, own, vocab_size, shares_cache=shared)
            )
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
        if sparsity:
            raise UsageError(
                "with --draft lookup there is nothing to make sparse: text guesses, and the model"
                " that checks guesses is dense",
                hint="The rows that several tokens need together are nearly all."
                " --draft lookup,self --sparsity 0.4 guesses with the sparse model too.",
            )
        return Draft(wanted, 0.0, _no_profile, lambda decoder: decoder)
    own = _own(wanted, ref, checkpoint, reporter, where)
    if sparsity is None:
        sparsity = chat_defaults(own.config).sparsity
    if own.folder == checkpoint.folder and not sparsity:
        raise UsageError(
            "--draft self with sparsity 0 guesses with what checks: nothing would be faster",
            hint="Give it a --sparsity, or integer weights: --draft self:int8.",
        )
    if own.folder != checkpoint.folder:
        require_memory(
            _needed(checkpoint, context) + own.nbytes + _cache_bytes(own, context, wanted),
            available_memory(on),
            f"{checkpoint.name} with {own.folder.name} of {own.name} to guess for it",
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
    models.remember(ref)  # the last model that was used, not what guesses for it

    @cache
    def load(decoder: Decoder) -> Decoder:
        return decoder if own.folder == checkpoint.folder else own.load(decoder.device)

    return Draft(wanted, sparsity, profile, load)


def on_model(
    guesser: Draft, tested: Subject, settings: Settings, method: str | None, reporter: Reporter
) -> Subject:
    """The subject of a benchmark with what guesses for it, at every sparsity."""
    drafts = _at_sparsities(guesser, settings)

    def attach(draft: Draft, session: Session) -> None:
        draft.attach(
            session, draft.setting(method), acceptance=settings.acceptance, reporter=reporter
        )

    return replace(tested, guessers={draft.label: partial(attach, draft) for draft in drafts})


def on_random(wanted: Wanted, tested: Subject, settings: Settings, reporter: Reporter) -> Subject:
    """The same for random weights: guessed by the same, or by those of another shape.

    Raises:
        UsageError: there is no such shape, or nobody says how many guesses are right.
        TealError: there is no memory for it.
    """
    decoder = own = tested.decoder
    kind = quantization(wanted.quantize)
    if wanted.model is not None and settings.acceptance is None:
        raise UsageError(
            "with random weights no guess is right",
            hint="Say how many are to count as right: --acceptance 0.8.",
        )
    if wanted.model not in (None, "self"):
        own, _ = random_model(wanted.model, decoder.dtype, settings, decoder.device, reporter, kind)
        _check_sizes(own.config, decoder.config, wanted.model or "", "what it guesses for")
    elif kind is not None:
        own = random_decoder(
            decoder.config,
            device=decoder.device,
            dtype=decoder.dtype,
            seed=settings.seed,
            kind=kind,
        )

    @cache
    def profile() -> Profile:
        return self_calibrated(own, seed=settings.seed, reporter=reporter)

    def attach(draft: Draft, session: Session) -> None:
        def setting(guessing: Session) -> Setting:
            if not draft.sparsity:
                return DENSE
            return met_setting(guessing, profile(), draft.sparsity, tested.prompt)

        draft.attach(session, setting, acceptance=settings.acceptance, reporter=reporter)

    drafts = _at_sparsities(Draft(wanted, 0.0, profile, lambda decoder: own), settings)
    return replace(tested, guessers={draft.label: partial(attach, draft) for draft in drafts})


def _at_sparsities(guesser: Draft, settings: Settings) -> list[Draft]:
    if guesser.wanted.model is None:
        return [guesser]
    return [replace(guesser, sparsity=sparsity) for sparsity in settings.sparsities]


def _own(
    wanted: Wanted, ref: ModelRef, checkpoint: Checkpoint, reporter: Reporter, where: dict[str, Any]
) -> Checkpoint:
    """The checkpoint that guesses, which goes with the one that checks."""
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    if wanted.model == "self":
        if wanted.quantize is not None:
            return pipeline.ensure_checkpoint(
                ref, dtype=dtype, quantize=wanted.quantize, reporter=reporter, **where
            )
        stored = (pipeline.stored_checkpoint(ref, dtype, form) for form in _FORMS)
        smaller = (form for form in stored if form and form.nbytes < checkpoint.nbytes)
        found = next(smaller, checkpoint)
        if found is not checkpoint:
            reporter.note(f"{found.folder.name} is here and guesses: --draft self")
        return found
    assert wanted.model is not None
    own = pipeline.ensure_checkpoint(
        models.resolve(wanted.model), quantize=wanted.quantize, reporter=reporter, **where
    )
    _check_pair(own, checkpoint)
    return own


def _check_pair(own: Checkpoint, checkpoint: Checkpoint) -> None:
    """Make sure that one model can guess for another.

    Raises:
        UsageError: it is larger, or its tokens are others.
    """
    _check_sizes(own.config, checkpoint.config, own.name, checkpoint.name)
    mine, others = (c.tokenizer().get_vocab() for c in (own, checkpoint))
    if mine != others:
        if len(mine) != len(others):
            why = f"it has {len(mine)} tokens, not {len(others)}"
        else:
            differing = sum(others.get(token) != number for token, number in mine.items())
            why = f"{differing} of {len(mine)} tokens differ"
        raise UsageError(
            f"{own.name} cannot guess for {checkpoint.name}: their vocabularies are not the same"
            f" ({why})",
            hint="Choose a smaller model of the same family, or --draft lookup.",
        )


def _check_sizes(own: ModelConfig, other: ModelConfig, name: str, other_name: str) -> None:
    ours, theirs = (weight_bytes(config, 1) for config in (own, other))
    if ours > theirs:
        raise UsageError(
            f"{name} has {ours / 1e9:.2f} billion weights, more than the {theirs / 1e9:.2f} of"
            f" {other_name}: what guesses has to be the smaller one"
        )


def _needed(checkpoint: Checkpoint, context: int) -> int:
    return checkpoint.nbytes + cache_bytes(checkpoint.config, checkpoint.dtype.itemsize, context)


def _cache_bytes(own: Checkpoint, context: int, wanted: Wanted) -> int:
    """Bytes of the guesser's own keys and values; those of the model itself are shared."""
    if wanted.model == "self":
        return 0
    return cache_bytes(own.config, own.dtype.itemsize, min(context, own.config.context_length))


def _no_profile() -> Profile:
    raise UsageError("text that is looked up has no sparsity")
