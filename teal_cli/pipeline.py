"""The user's road: what a command needs and does not find, it makes.

download → convert → calibrate, each cached; the commands eval, chat and bench start here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.model.checkpoint import MANIFEST, Checkpoint
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, hub, models, paths
from teal_cli.store.models import ModelRef
from teal_cli.text.sample import SampleSettings

if TYPE_CHECKING:
    from torch import Tensor

    from teal_cli.model.config import ModelConfig
    from teal_cli.model.convert import Rounding
    from teal_cli.sparsity.profile import Profile

# Rounding with regard for inputs learns a matrix of products where a profile learns quantiles.
ROUNDING_TEXT = SampleSettings(samples=64)
# Thresholds for a first answer: a fifteenth of the work of a whole calibration.
QUICK_TEXT = SampleSettings(samples=4)


def ensure_checkpoint(
    ref: ModelRef,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    thresholds: Literal["best", "quick"] | None = None,
    device: str = "auto",
    token: str | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> Checkpoint:
    """The model's converted checkpoint, downloaded and converted first if it is not there.

    A converted model of the Hub is used as it is, without asking the Hub for a newer one
    (`teal convert` does); a local one is compared with its source. `dtype` None is the source's
    own, `quantize` is a key of QUANTIZATIONS, and `device` where a quantized one is made. With
    `thresholds`, those that the command asks `ensure_profile` for next, the steps are counted to
    the end.
    """
    from teal_cli.model.convert import COMPANIONS, convert, renew_companions

    checkpoint = stored_checkpoint(ref, dtype, quantize) if ref.kind == "hub" else None
    if checkpoint is not None and checkpoint.companions < COMPANIONS:
        with contextlib.suppress(MissingError):  # its files are no longer here
            source = hub.fetch(ref, offline=True, reporter=reporter)
            checkpoint = renew_companions(checkpoint, source, reporter)
    if checkpoint is None:
        arrived = "the model's files are", "what has been downloaded is"
        with broken_off(reporter, lambda: arrived[not hub.is_here(ref)]):
            ahead = _steps_to_thresholds(ref, quantize, thresholds)
            reporter.expect([None] * (1 if hub.is_here(ref) else 2) + ahead)
            try:
                source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)
            except MissingError as error:
                raise _or_another_dtype(error, ref, quantize) from error
            rounding = rounding_for(quantize, device=device, offline=offline, reporter=reporter)
            folder = convert(source, dtype=dtype, rounding=rounding, reporter=reporter)
            reporter.expect(ahead)
        checkpoint = Checkpoint(folder)
    models.remember(ref)
    return checkpoint


def rounding_for(
    quantize: str | None,
    method: str | None = None,
    text: Mapping[str, Any] | None = None,
    *,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Rounding | None:
    """How `quantize`, a key of QUANTIZATIONS, makes its integers; None where it is None.

    Args:
        quantize: its name.
        method: "gptq" or "nearest"; None takes the best, and what is there of any.
        text: fields of `SampleSettings` that the user gave, for a method that reads text.
        device: where such a method runs.
        offline: ask no server for the text.
        reporter: follows what takes long.

    Raises:
        UsageError: the quantization has no such method, or it reads no text.
    """
    from teal_cli.inference.device import pick_device
    from teal_cli.model.convert import Nearest
    from teal_cli.model.quantization import quantization
    from teal_cli.rounding.layerwise import Gptq

    kind = quantization(quantize)
    if kind is None:
        return None
    asked: dict[str, Any] = {"method": method} if method else {}
    if method == "nearest" or not kind.group:
        if text or method == "gptq":
            raise UsageError(
                "rounding to the nearest integers reads no text"
                if kind.group
                else "int8 is rounded to the nearest integers, which reads no text"
            )
        return Nearest(kind, asked)
    settings = dataclasses.replace(ROUNDING_TEXT, **(text or {}))
    if text:
        asked["settings"] = dataclasses.asdict(settings)

    def read(tokenizer: Any, config: ModelConfig) -> tuple[Tensor, dict[str, Any]]:
        corpus, tokens = settings.read(
            tokenizer, config.context_length, offline=offline, reporter=reporter
        )
        return tokens, settings.provenance(corpus)

    return Gptq(kind, read, pick_device(device), asked)


def ensure_profile(
    checkpoint: Checkpoint,
    *,
    quick: bool = False,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Profile:
    """The checkpoint's sparsity profile: its own, else the built-in one, else calibrated now.

    Args:
        checkpoint: the model.
        quick: thresholds that are made in a hurry will do, where there are no better ones.
        device: where the model runs.
        offline: ask no server for the text.
        reporter: follows what takes long.

    Raises:
        TealError: the profile that is there belongs to other weights.
    """
    from teal_cli.sparsity import stored

    found = stored.profile_of(checkpoint)
    profile = None if found is None else found[0]
    if profile is None or (profile.quick and not quick):
        text = QUICK_TEXT if quick else None
        profile = make_profile(
            checkpoint, text, quick=quick, device=device, offline=offline, reporter=reporter
        )
    reporter.expect(())  # nothing is left to make
    if profile.quick:
        reporter.note(
            f"quick thresholds, learnt from {profile.provenance['samples']} windows of text: "
            f"`teal calibrate {stored.arguments(checkpoint)}` makes better ones"
        )
    return profile


def stored_profile(
    ref: ModelRef, dtype: str | None = None, quantize: str | None = None
) -> tuple[Profile, Path | None]:
    """A model's profile as it is, and its file; the built-in one has none. Makes nothing.

    Raises:
        MissingError: the model has no profile yet.
        TealError: the profile that is there belongs to other weights, or is damaged.
    """
    from teal_cli.sparsity import presets, stored

    checkpoint = stored_checkpoint(ref, dtype, quantize)
    if checkpoint is not None:
        found = stored.profile_of(checkpoint)
    else:
        preset = presets.preset_for(ref.name) if quantize is None else None
        found = None if preset is None else (preset, None)
    if found is None:
        words = {"--quantize": quantize, "--dtype": dtype}
        options = "".join(f" {name} {value}" for name, value in words.items() if value)
        raise stored.no_profile(f"{ref.path or ref.name}{options}")
    return found


def make_profile(
    checkpoint: Checkpoint,
    settings: SampleSettings | None = None,
    *,
    method: str | None = None,
    quick: bool = False,
    force: bool = False,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Profile:
    """Calibrate a checkpoint and store its profile; resumes what an earlier, killed run began.

    Args:
        checkpoint: the model.
        settings: the text; None is the usual one, and a quantized model then starts from what
            the profile of its floats gives each projection, unless `force` says otherwise.
        method: how to share sparsity out, by default the best; `uniform` comes with each.
        quick: learn the distributions alone, and mark the profile.
        force: put the profile in the place of any, and use nothing of one of the same text.
        device: where the model runs.
        offline: ask no server for the text.
        reporter: follows the layers.

    Raises:
        UsageError: a profile of another text is there, and nobody said `force`.
    """
    from teal_cli.inference.device import pick_device
    from teal_cli.sparsity import presets, stored, streaming
    from teal_cli.sparsity.calibrate import calibrate, costs
    from teal_cli.sparsity.profile import METHODS, Profile

    path = stored.profile_path(checkpoint)
    before = _modified(path)
    floats = stored.of_floats(checkpoint) if settings in (None, QUICK_TEXT) and not force else None
    settings = settings or SampleSettings()
    corpus, tokens = settings.read(
        checkpoint.tokenizer(),
        checkpoint.config.context_length,
        offline=offline,
        reporter=reporter,
    )
    work_dir = stored.work_dir(path, quick=quick)
    with artifacts.lock(path, reporter):
        own = stored.usable_profile(checkpoint)
        base = None
        if own is not None and not own.quick and stored.of_text(own, settings, corpus.fingerprint):
            base = own
        known = presets.allocations_for(checkpoint.name)
        if floats is not None:
            known = {**known, **floats.allocations}
            method = method or floats.default_method
        method = method or METHODS[0]
        # Another process may have made one while this one waited.
        wanted = own is not None and (quick or (base is not None and method in own.offsets))
        if own is not None and wanted and _modified(path) != before:
            return own
        if force:
            base = None
        elif base is None:
            stored.check_replaceable(checkpoint, own)
        artifacts.remove_leftovers(path)
        artifacts.remove_leftovers(work_dir)
        reporter.note(
            f"calibrating {checkpoint.name} on {corpus.name} ({corpus.part}): "
            f"{len(tokens)} windows of {tokens.shape[1]} tokens → {path}"
        )
        methods = () if quick else tuple(dict.fromkeys((method, *known, "uniform")))
        provenance = settings.provenance(corpus)
        if quick:
            provenance["quick"] = True
        if floats is not None:
            provenance["allocations"] = f"of {floats.model} without quantization"
        reporter.expect(costs(len(tokens), methods, base=base, allocations=known))
        kept = (
            f"`teal chat {stored.arguments(checkpoint)} -s 0` answers now, without sparsity; the "
            "converted model and the layers that are done are"
        )
        with broken_off(reporter, lambda: kept):
            profile = calibrate(
                streaming.load(checkpoint, pick_device(device), reporter),
                tokens,
                model=checkpoint.name,
                fingerprint=checkpoint.fingerprint,
                methods=methods,
                base=base,
                allocations=known,
                provenance=provenance,
                work_dir=work_dir,
                reporter=reporter,
            )
        with artifacts.spent(work_dir), artifacts.spent(stored.work_dir(path, quick=True)):
            profile.save(path)
        reporter.expect(())
    return Profile.load(path)  # as every later run sees it: rounded to float32


def _steps_to_thresholds(
    ref: ModelRef, quantize: str | None, thresholds: str | None
) -> list[float | None]:
    """What calibration will cost, as far as that is known before the model is here."""
    from teal_cli.sparsity import presets
    from teal_cli.sparsity.calibrate import costs
    from teal_cli.sparsity.profile import METHODS

    known = ref.name == models.DEMO or presets.preset_for(ref.name) is not None
    if thresholds is None or (known and quantize is None):
        return []
    if thresholds == "quick":
        return costs(QUICK_TEXT.samples, ())
    return costs(SampleSettings().samples, (METHODS[0], "uniform"))


@contextlib.contextmanager
def broken_off(reporter: Reporter, what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Tell whoever presses Ctrl-C in the block what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        reporter.note(f"{what_is_kept()} kept: the same command goes on from there")
        raise


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def stored_checkpoint(ref: ModelRef, dtype: str | None, quantize: str | None) -> Checkpoint | None:
    """The checkpoint that is there; where no dtype is asked for, the one in the source's own."""
    if dtype is not None:
        candidates = [paths.checkpoint_dir(ref.slug, dtype, quantize)]
    else:
        # Versions before did not note the own dtype; what they made first was nobody's option.
        candidates = sorted(_forms(ref, quantize), key=lambda f: (f / MANIFEST).stat().st_mtime)
    for candidate in candidates:
        try:
            checkpoint = Checkpoint(candidate)
        except MissingError:
            continue
        if dtype is not None or checkpoint.in_own_dtype:
            return checkpoint
    return None


def _forms(ref: ModelRef, quantize: str | None) -> list[Path]:
    """Folders of a model's checkpoints of one quantization, in all dtypes."""
    pattern = paths.checkpoint_dir(ref.slug, "[!.-]*", quantize).name
    found = paths.model_dir(ref.slug).glob(f"{pattern}/{MANIFEST}")
    return [file.parent for file in found if quantize or "-" not in file.parent.name]


def _or_another_dtype(error: MissingError, ref: ModelRef, quantize: str | None) -> TealError:
    """The error with a hint at what is here of a model whose source is not."""
    forms = sorted(folder.name.split("-")[0] for folder in _forms(ref, quantize))
    if not forms:
        return error
    return MissingError(str(error), hint=f"It is here in another dtype: --dtype {forms[0]}.")
