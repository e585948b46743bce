"""Where a model's profile is, which one is its, and whether it was made as asked."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli.errors import MissingError, TealError, UsageError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.progress import Reporter, Silent
from teal_cli.sparsity import presets
from teal_cli.sparsity.profile import Profile
from teal_cli.store import artifacts, paths

if TYPE_CHECKING:
    from teal_cli.text.sample import SampleSettings


def profile_path(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's own profile is, or will be."""
    return paths.profile_path(checkpoint.folder.parent.name, checkpoint.folder.name)


def work_dir(profile: Path, *, quick: bool = False) -> Path:
    """What a calibration of this profile has done so far; a quick one has a folder of its own."""
    name = f"{profile.stem}-quick" if quick else profile.stem
    return paths.cache_dir() / "calibration" / profile.parent.name / name


def own_profile(checkpoint: Checkpoint) -> Profile | None:
    """The profile that is stored for a checkpoint; None if there is none.

    Raises:
        TealError: it belongs to other weights, or is damaged.
    """
    path = profile_path(checkpoint)
    if not path.exists():
        return None
    artifacts.remove_leftovers(work_dir(path))
    profile = Profile.load(path)
    profile.check(checkpoint.config, checkpoint.fingerprint)
    return profile


def usable_profile(checkpoint: Checkpoint) -> Profile | None:
    """As `own_profile`; None as well if it is damaged or belongs to other weights."""
    try:
        return own_profile(checkpoint)
    except TealError:
        return None


def profile_of(checkpoint: Checkpoint) -> tuple[Profile, Path | None] | None:
    """A checkpoint's profile and its file: its own, else the built-in one, which has none.

    Quick thresholds come last.

    Raises:
        TealError: its own belongs to other weights, or is damaged.
    """
    own = own_profile(checkpoint)
    if own is None or own.quick:
        preset = built_in(checkpoint)
        if preset is not None:
            return preset, None
    return None if own is None else (own, profile_path(checkpoint))


def usable_or_built_in(checkpoint: Checkpoint) -> Profile | None:
    """As `profile_of`; None as well if its own is damaged or belongs to other weights."""
    try:
        found = profile_of(checkpoint)
    except TealError:
        return None
    return None if found is None else found[0]


def of_floats(checkpoint: Checkpoint) -> Profile | None:
    """The profile of the weights that a quantized checkpoint was rounded from, if there is one."""
    if checkpoint.quantization is None:
        return None
    floats = unquantized(checkpoint)
    if floats is not None:
        own = usable_profile(floats)
        if own is not None and not own.quick:
            return own
    return _of_source(checkpoint)


def unquantized(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint of a quantized one's source in the same dtype, if it is there."""
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    try:
        floats = Checkpoint(checkpoint.folder.with_name(dtype))
    except TealError:
        return None
    same = floats.source_fingerprint == checkpoint.source_fingerprint
    return floats if same and floats.quantization is None else None


def made_as_asked(profile: Profile, given: Mapping[str, Any]) -> bool:
    """Whether a profile was made with `given`, the fields of `SampleSettings` that the user gave.

    A file of text has to be what it was.
    """
    from teal_cli.text.corpora import is_file, load_corpus

    made = {**profile.provenance.get("settings", {}), "dataset": profile.provenance.get("dataset")}
    if any(made.get(name) != value for name, value in given.items()):
        return False
    if "dataset" not in given or not is_file(given["dataset"]):
        return True
    corpus = load_corpus(
        given["dataset"], split_role="calibration", column=given.get("column"), reporter=Silent()
    )
    return bool(corpus.fingerprint == profile.provenance.get("dataset_fingerprint"))


def of_text(profile: Profile, settings: SampleSettings, text: str) -> bool:
    """Whether a profile is of the windows that these settings choose of this text."""
    made = profile.provenance
    same = made.get("settings") == dataclasses.asdict(settings)
    return same and made.get("dataset_fingerprint") == text


def check_replaceable(checkpoint: Checkpoint, profile: Profile | None) -> None:
    """Make sure that a profile, the one that is stored, is not lost by what is asked.

    Raises:
        UsageError: it holds more than quick thresholds.
    """
    if profile is None or profile.quick:
        return
    made = profile.provenance
    text = f"{made.get('dataset', 'another text')}"
    if "samples" in made:
        text += f", {made['samples']} windows of {made['seq_len']} tokens"
    raise UsageError(
        f"{checkpoint.name} has a profile already, made otherwise "
        f"({', '.join(profile.methods)}; {text})",
        hint="Nothing was changed: --force puts the new one in its place.",
    )


def note_replacing(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Say that a built-in profile, where it counts now, will count no more."""
    own, present = usable_profile(checkpoint), usable_or_built_in(checkpoint)
    if present is not None and not present.quick and (own is None or own.quick):
        reporter.note(f"takes {instead_of(present, profile_path(checkpoint))}")


def instead_of(preset: Profile, path: Path) -> str:
    """What a profile in a file does with the built-in one, and how to have that again."""
    vectors = " and its vectors" if preset.recovery else ""
    return f"the place of the built-in profile{vectors}; to have that again, remove {path}"


def arguments(checkpoint: Checkpoint) -> str:
    """How the checkpoint is named on a command line."""
    words = [checkpoint.name]
    if checkpoint.quantization is not None:
        words += ["--quantize", checkpoint.quantization.name]
    if not checkpoint.in_own_dtype:
        words += ["--dtype", str(checkpoint.dtype).removeprefix("torch.")]
    return shlex.join(words)


def no_profile(named: str) -> MissingError:
    """The error for a model that has no profile yet."""
    return MissingError(
        f"{named} has no profile yet", hint=f"Make one with: teal calibrate {named}"
    )


def built_in(checkpoint: Checkpoint) -> Profile | None:
    """The profile that teal brings for a checkpoint, where it is not quantized.

    Rounding changes the activations, and the built-in thresholds are of float weights.

    Raises:
        TealError: it is for a model of another shape.
    """
    return None if checkpoint.quantization is not None else _of_source(checkpoint)


def _of_source(checkpoint: Checkpoint) -> Profile | None:
    """The profile that teal brings for the weights that a checkpoint was made of.

    Raises:
        TealError: it is for a model of another shape.
    """
    preset = presets.preset_for(checkpoint.name, checkpoint.source_fingerprint)
    if preset is not None:
        preset.check(checkpoint.config)
    return preset
