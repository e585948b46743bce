"""The user's road: what a command needs and does not find, it makes.

download → convert → calibrate, each cached; the commands eval, chat and bench start here.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.errors import MissingError, TealError
from teal_cli.model.checkpoint import MANIFEST, Checkpoint
from teal_cli.progress import Reporter
from teal_cli.store import artifacts, hub, models, paths
from teal_cli.store.models import ModelRef

if TYPE_CHECKING:
    from teal_cli.sparsity.profile import Profile


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


def ensure_checkpoint(
    ref: ModelRef,
    *,
    dtype: str | None = None,
    token: str | None = None,
    offline: bool = False,
    reporter: Reporter,
) -> Checkpoint:
    """The model's converted checkpoint, downloaded and converted first if it is not there.

    A converted model of the Hub is used as it is, without asking the Hub for a newer one
    (`teal convert` does); a local one is compared with its source.
    """
    from teal_cli.model.convert import convert

    checkpoint = _converted(ref, dtype) if ref.kind == "hub" else None
    if checkpoint is None:
        source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)
        checkpoint = Checkpoint(convert(source, dtype=dtype, reporter=reporter))
    models.remember(ref)
    return checkpoint


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
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
        return profile
    preset = presets.preset_for(checkpoint.name)
    if preset is not None:
        preset.check(checkpoint.config)
        return preset
    return make_profile(
        checkpoint, CalibrationSettings(), device=device, offline=offline, reporter=reporter
    )


def stored_profile(ref: ModelRef, dtype: str | None = None) -> tuple[Profile, Path | None]:
    """A model's profile as it is, and its file; the built-in one has none. Makes nothing.

    Raises:
        MissingError: the model has no profile yet.
        TealError: the profile that is there belongs to other weights, or is damaged.
    """
    from teal_cli.sparsity import presets
    from teal_cli.sparsity.profile import Profile

    checkpoint = _converted(ref, dtype)
    if checkpoint is not None and (path := profile_path(checkpoint)).exists():
        profile = Profile.load(path)
        profile.check(checkpoint.config, checkpoint.fingerprint)
        return profile, path
    preset = presets.preset_for(ref.name)
    if preset is None:
        named = ref.path or ref.name
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
    from teal_cli.sparsity.profile import METHODS
    from teal_cli.text.corpora import load_corpus
    from teal_cli.text.windows import windows

    path = profile_path(checkpoint)
    before = _modified(path)
    corpus = load_corpus(
        settings.dataset,
        split_role="calibration",
        column=settings.column,
        offline=offline,
        reporter=reporter,
    )
    tokens = windows(
        checkpoint.tokenizer(),
        corpus,
        seq_len=min(settings.seq_len, checkpoint.config.max_position_embeddings),
        samples=settings.samples,
        seed=settings.seed,
    )
    work_dir = paths.cache_dir() / "calibration" / path.parent.name / path.stem
    with artifacts.lock(path, reporter):
        method = method or METHODS[0]
        base = _same_text(path, checkpoint, settings, corpus.fingerprint)
        # Another process may have made one while this one waited.
        if base is not None and method in base.offsets and _modified(path) != before:
            return base
        if force:
            base = None
        artifacts.remove_leftovers(path)
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
            provenance={
                "dataset": corpus.name,
                "dataset_part": corpus.part,
                "dataset_fingerprint": corpus.fingerprint,
                "seed": settings.seed,
                "settings": dataclasses.asdict(settings),
            },
            work_dir=work_dir,
            reporter=reporter,
        )
        profile.save(path)
        shutil.rmtree(work_dir, ignore_errors=True)
    return profile


def profile_path(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's profile is, or will be."""
    return paths.profile_path(checkpoint.folder.parent.name, checkpoint.folder.name)


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


def _converted(ref: ModelRef, dtype: str | None) -> Checkpoint | None:
    """The checkpoint that is there; of several dtypes, and none asked for, the newest."""
    folder = paths.model_dir(ref.slug)
    if dtype is not None:
        candidates = [folder / dtype]
    else:
        manifests = sorted(folder.glob(f"[!.]*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
        candidates = [path.parent for path in manifests[-1:]]
    for candidate in candidates:
        try:
            return Checkpoint(candidate)
        except MissingError:
            continue
    return None
