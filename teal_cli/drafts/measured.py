"""What `--draft` names, beside what a benchmark measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.cost import require_memory, weight_bytes
from teal_cli.benchmark.self_calibration import met_setting, self_calibrated
from teal_cli.benchmark.subject import Subject, random_model, shape_of
from teal_cli.drafts.names import Wanted
from teal_cli.drafts.pairs import check_sizes
from teal_cli.drafts.ready import LESS_MEMORY, Draft, with_quick_head
from teal_cli.environment import available_memory
from teal_cli.errors import UsageError
from teal_cli.inference.session import Session
from teal_cli.model.quantization import quantization
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import DENSE, Setting


def on_model(
    guesser: Draft,
    tested: Subject,
    settings: Settings,
    setting: Callable[[Draft], Setting],
    reporter: Reporter,
) -> Subject:
    """The subject of a benchmark with what guesses for it, at every sparsity.

    Args:
        guesser: what guesses.
        tested: what checks.
        settings: the sparsities, and what acceptance is assumed.
        setting: how sparse the guesses are, by what guesses at one sparsity.
        reporter: told what the guesser's own session has to say.
    """
    drafts = _at_sparsities(guesser, settings)

    def attach(draft: Draft, session: Session) -> None:
        draft.attach(session, setting(draft), acceptance=settings.acceptance, reporter=reporter)

    return replace(tested, guessers={draft.label: partial(attach, draft) for draft in drafts})


def check_random(wanted: Wanted, model: str | None, settings: Settings) -> None:
    """Make sure that something can guess for random weights, before they are made.

    Raises:
        UsageError: there is no such shape, it is the larger one, or nobody says how many guesses
            are right.
    """
    if wanted.model is None:
        return
    if settings.acceptance is None:
        raise UsageError(
            "with random weights no guess is right",
            hint="Say how many are to count as right: --acceptance 0.8.",
        )
    if not wanted.is_self:
        (name, config), (own_name, own) = shape_of(model), shape_of(wanted.model)
        check_sizes(own, config, own_name, name)


def on_random(wanted: Wanted, tested: Subject, settings: Settings, reporter: Reporter) -> Subject:
    """The same for random weights: guessed by the same, or by those of another shape.

    Raises:
        TealError: there is no memory for it.
    """
    decoder = own = tested.decoder
    kind = quantization(wanted.quantize)
    if wanted.model is not None and not wanted.is_self:
        own, _ = random_model(wanted.model, decoder.dtype, settings, decoder.device, reporter, kind)
    elif kind is not None:
        require_memory(
            weight_bytes(decoder.config, decoder.dtype.itemsize, kind),
            available_memory(decoder.device),
            f"{kind.name} of it to guess for {tested.description['name']}",
            hint=LESS_MEMORY,
        )
        own = random_decoder(
            decoder.config,
            device=decoder.device,
            dtype=decoder.dtype,
            seed=settings.seed,
            kind=kind,
        )
    if wanted.model is not None and decoder.device.type == "cuda":
        own = with_quick_head(own)

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
