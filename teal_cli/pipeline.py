"""The user's road: what a command needs and does not find, it makes.

download → convert → calibrate, each cached; the commands eval, chat and bench start here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.model.checkpoint import MANIFEST, Checkpoint
from teal_cli.progress import Reporter, Silent
from teal_cli.store import artifacts, hub, models, paths
from teal_cli.store.models import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from teal_cli.model.config import ModelConfig
    from teal_cli.model.convert import Rounding
    from teal_cli.sparsity.profile import Profile
    from teal_cli.text.corpora import Corpus


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """The text that calibration reads: `samples` windows of `seq_len` tokens.

    On the demo model, three times as many windows move the model's sparsity at a target by
    0.0002, and that of a single projection by at most 0.017 (mean 0.002).
    """

    dataset: str | None = None
    column: str | None = None
    samples: int = 16
    seq_len: int = 512
    seed: int = 0


# Rounding with regard for inputs learns a matrix of products where a profile learns quantiles.
ROUNDING_TEXT = CalibrationSettings(samples=64)


def ensure_checkpoint(
    ref: ModelRef,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    device: str = "auto",
    token: str | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> Checkpoint:
    """The model's converted checkpoint, downloaded and converted first if it is not there.

    A converted model of the Hub is used as it is, without asking the Hub for a newer one
    (`teal convert` does); a local one is compared with its source. `quantize` is a key of
    QUANTIZATIONS, and `device` where a quantized one is made.
    """
    from teal_cli.model.convert import COMPANIONS, convert, renew_companions

    checkpoint = _converted(ref, dtype, quantize) if ref.kind == "hub" else None
    if checkpoint is not None and checkpoint.companions < COMPANIONS:
        with contextlib.suppress(MissingError):  # its files are no longer here
            source = hub.fetch(ref, offline=True, reporter=reporter)
            checkpoint = renew_companions(checkpoint, source, reporter)
    if checkpoint is None:
        source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)
        rounding = rounding_for(quantize, device=device, offline=offline, reporter=reporter)
        checkpoint = Checkpoint(convert(source, dtype=dtype, rounding=rounding, reporter=reporter))
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
        text: fields of `CalibrationSettings` that the user gave, for a method that reads text.
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
        corpus, tokens = _read_text(settings, tokenizer, config, offline, reporter)
        return tokens, _provenance(corpus, settings)

    return Gptq(kind, read, pick_device(device), asked)


def ensure_profile(
    checkpoint: Checkpoint, *, device: str = "auto", offline: bool = False, reporter: Reporter
) -> Profile:
    """The checkpoint's sparsity profile: its own, else the built-in one, else calibrated now.

    Raises:
        TealError: the profile that is there belongs to other weights.
    """
    from teal_cli.sparsity import presets
    from teal_cli.sparsity.profile import Profile

    path = profile_path(checkpoint)
    if path.exists():
        artifacts.remove_leftovers(_work_dir(path))
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
        return profile
    # Rounding changes the activations, and the built-in thresholds are of float weights.
    preset = presets.preset_for(checkpoint.name) if checkpoint.quantization is None else None
    if preset is not None:
        preset.check(checkpoint.config)
        return preset
    return make_profile(
        checkpoint, CalibrationSettings(), device=device, offline=offline, reporter=reporter
    )


def stored_profile(
    ref: ModelRef, dtype: str | None = None, quantize: str | None = None
) -> tuple[Profile, Path | None]:
    """A model's profile as it is, and its file; the built-in one has none. Makes nothing.

    Raises:
        MissingError: the model has no profile yet.
        TealError: the profile that is there belongs to other weights, or is damaged.
    """
    from teal_cli.sparsity import presets
    from teal_cli.sparsity.profile import Profile

    checkpoint = _converted(ref, dtype, quantize)
    if checkpoint is not None and (path := profile_path(checkpoint)).exists():
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
        return profile, path
    preset = presets.preset_for(ref.name) if quantize is None else None
    if preset is None:
        named = f"{ref.path or ref.name}{f' --quantize {quantize}' if quantize else ''}"
        raise MissingError(
            f"{named} has no profile yet", hint=f"Make one with: teal calibrate {named}"
        )
    return preset, None


def make_profile(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    *,
    method: str | None = None,
    force: bool = False,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Profile:
    """Calibrate a checkpoint and store its profile; resumes what an earlier, killed run began.

    Args:
        checkpoint: the model.
        settings: the text.
        method: how to share sparsity out, by default the best; `uniform` comes with each.
        force: leave aside a profile of the same text, whose histograms would serve again.
        device: where the model runs.
        offline: ask no server for the text.
        reporter: follows the layers.
    """
    from teal_cli.inference.device import pick_device
    from teal_cli.sparsity import presets, streaming
    from teal_cli.sparsity.calibrate import calibrate
    from teal_cli.sparsity.profile import METHODS, Profile

    path = profile_path(checkpoint)
    before = _modified(path)
    corpus, tokens = _read_text(
        settings, checkpoint.tokenizer(), checkpoint.config, offline, reporter
    )
    work_dir = _work_dir(path)
    with artifacts.lock(path, reporter):
        method = method or METHODS[0]
        base = _same_text(path, checkpoint, settings, corpus.fingerprint)
        # Another process may have made one while this one waited.
        if base is not None and method in base.offsets and _modified(path) != before:
            return base
        if force:
            base = None
        artifacts.remove_leftovers(path)
        artifacts.remove_leftovers(work_dir)
        reporter.note(
            f"calibrating {checkpoint.name} on {corpus.name} ({corpus.part}): "
            f"{len(tokens)} windows of {tokens.shape[1]} tokens → {path}"
        )
        known = presets.allocations_for(checkpoint.name)
        profile = calibrate(
            streaming.load(checkpoint, pick_device(device), reporter),
            tokens,
            model=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            methods=tuple(dict.fromkeys((method, *known, "uniform"))),
            base=base,
            allocations=known,
            provenance=_provenance(corpus, settings),
            work_dir=work_dir,
            reporter=reporter,
        )
        with artifacts.spent(work_dir):
            profile.save(path)
    return Profile.load(path)  # as every later run sees it: rounded to float32


def made_as_asked(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Profile | None:
    """The profile that is there, if it belongs to the checkpoint and was made as asked.

    Args:
        checkpoint: the model.
        given: fields of `CalibrationSettings` that the user gave.
    """
    from teal_cli.sparsity import presets
    from teal_cli.sparsity.profile import Profile
    from teal_cli.text.corpora import is_file, load_corpus

    path = profile_path(checkpoint)
    if not path.exists():
        if given or checkpoint.quantization is not None:
            return None
        return presets.preset_for(checkpoint.name)
    artifacts.remove_leftovers(_work_dir(path))
    try:
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
    except TealError:  # damaged, or the model has changed since
        return None
    made = {**profile.provenance.get("settings", {}), "dataset": profile.provenance.get("dataset")}
    if any(made.get(name) != value for name, value in given.items()):
        return None
    if "dataset" in given and is_file(given["dataset"]):
        corpus = load_corpus(
            given["dataset"],
            split_role="calibration",
            column=given.get("column"),
            reporter=Silent(),
        )
        if corpus.fingerprint != profile.provenance.get("dataset_fingerprint"):
            return None
    return profile


def profile_path(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's profile is, or will be."""
    return paths.profile_path(checkpoint.folder.parent.name, checkpoint.folder.name)


def _work_dir(profile: Path) -> Path:
    """What a calibration of this profile has done so far."""
    return paths.cache_dir() / "calibration" / profile.parent.name / profile.stem


def _read_text(
    settings: CalibrationSettings,
    tokenizer: Any,
    config: ModelConfig,
    offline: bool,
    reporter: Reporter,
) -> tuple[Corpus, Tensor]:
    """The text that settings name, and its windows [samples, seq_len] int64."""
    from teal_cli.text.corpora import load_corpus
    from teal_cli.text.windows import windows

    corpus = load_corpus(
        settings.dataset,
        split_role="calibration",
        column=settings.column,
        offline=offline,
        reporter=reporter,
    )
    tokens = windows(
        tokenizer,
        corpus,
        seq_len=min(settings.seq_len, config.context_length),
        samples=settings.samples,
        seed=settings.seed,
    )
    return corpus, tokens


def _provenance(corpus: Corpus, settings: CalibrationSettings) -> dict[str, Any]:
    return {
        "dataset": corpus.name,
        "dataset_part": corpus.part,
        "dataset_fingerprint": corpus.fingerprint,
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
    }


def _same_text(
    path: Path, checkpoint: Checkpoint, settings: CalibrationSettings, text: str
) -> Profile | None:
    """The profile that is there, if it is of these weights and of this text."""
    from teal_cli.sparsity.profile import Profile

    try:
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
    except TealError:
        return None
    made = profile.provenance
    same = made.get("settings") == dataclasses.asdict(settings)
    return profile if same and made.get("dataset_fingerprint") == text else None


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _converted(ref: ModelRef, dtype: str | None, quantize: str | None) -> Checkpoint | None:
    """The checkpoint that is there; of several dtypes, and none asked for, the newest."""
    folder = paths.model_dir(ref.slug)
    if dtype is not None:
        candidates = [paths.checkpoint_dir(ref.slug, dtype, quantize)]
    else:
        pattern = paths.checkpoint_dir(ref.slug, "[!.-]*", quantize).name
        manifests = [
            path
            for path in folder.glob(f"{pattern}/{MANIFEST}")
            if quantize or "-" not in path.parent.name
        ]
        manifests.sort(key=lambda path: path.stat().st_mtime)
        candidates = [path.parent for path in manifests[-1:]]
    for candidate in candidates:
        try:
            return Checkpoint(candidate)
        except MissingError:
            continue
    return None
