"""`teal calibrate --recover`: which vectors a model's profile lacks, and learning them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from teal_cli import pipeline
from teal_cli.errors import UsageError
from teal_cli.inference.device import pick_device
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity import stored, streaming
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.recover import Lesson, check_targets, check_text, recover
from teal_cli.sparsity.recovery import TARGETS
from teal_cli.sparsity.workspace import Workspace
from teal_cli.store import artifacts
from teal_cli.text.sample import SampleSettings
from teal_cli.version import __version__

# Steps a target, and tokens of the window that each reads. On two cores a step of the demo model
# takes 5 s.
EFFORT = {"cuda": (200, 2048), "cpu": (50, 512)}


def ensure_recovery(
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    *,
    method: str | None = None,
    targets: Sequence[float] | None = None,
    force: bool = False,
    device: str = "auto",
    offline: bool = False,
    reporter: Reporter,
) -> Profile:
    """The checkpoint's profile with vectors for `targets`, learnt now where it lacks them.

    Args:
        checkpoint: the model; one that is quantized learns from the dense model that it was
            rounded from, where that is here.
        given: fields of `SampleSettings` that the user gave.
        method: whose thresholds the vectors go with, by default the profile's best.
        targets: sparsities, by default TARGETS.
        force: learn again what is there.
        device: where the model runs.
        offline: ask no server for the text.
        reporter: follows the steps.

    Raises:
        UsageError: there is too little text, or vectors of another text, and nobody said `force`.
        TealError: the loss is not finite.
    """
    where: dict[str, Any] = {"device": device, "offline": offline, "reporter": reporter}
    profile = pipeline.ensure_profile(checkpoint, **where)
    method = method or profile.default_method
    wanted = tuple(targets or TARGETS)
    check_targets(profile, method, wanted)  # before any text is read
    target_device = pick_device(device)
    steps, seq_len = EFFORT[target_device.type]
    before = {} if force else _settings(profile, method)
    # As many windows as the steps read: a text that is read again is learnt by heart.
    settings = SampleSettings(**{"samples": steps, "seq_len": seq_len, **before, **given})
    corpus, windows = settings.read(
        checkpoint.tokenizer(),
        checkpoint.config.context_length,
        offline=offline,
        reporter=reporter,
    )
    check_text(len(windows))
    path = stored.profile_path(checkpoint)
    work_dir = stored.work_dir(path).with_name(f"{path.stem}-recover")
    with artifacts.lock(path, reporter):
        # Another process may have learnt some while this one waited.
        profile = stored.usable_or_built_in(checkpoint) or profile
        known = profile.recovery.get(method)
        source = settings.provenance(corpus)
        if known is not None and not force:
            wanted = tuple(target for target in wanted if target not in known.targets)
            # All targets' vectors are of one text.
            another = any(known.provenance.get(name) != value for name, value in source.items())
            if another and (given or wanted):
                raise UsageError(
                    f"{checkpoint.name} has vectors already, learnt from another text "
                    f"({known.provenance.get('dataset', 'unknown')})",
                    hint="Nothing was changed: --force learns them anew.",
                )
        elif force:
            others = {name: found for name, found in profile.recovery.items() if name != method}
            profile = dataclasses.replace(profile, recovery=others)
        if not wanted:
            reporter.note("up to date: --force learns again")
            reporter.expect(())
            return profile
        decoder = streaming.load(checkpoint, target_device, reporter)
        teacher, dense = _teacher(checkpoint, decoder, reporter)
        floats = stored.of_floats(checkpoint)
        start = None if floats is None else floats.recovery.get(method)
        reporter.note(
            f"learning vectors of {checkpoint.name} at {', '.join(f'{t:g}' for t in wanted)} from "
            f"{corpus.name} ({corpus.part}): {len(windows)} windows of {windows.shape[1]} tokens → "
            f"{path}"
        )
        stored.note_replacing(checkpoint, reporter)
        reporter.expect([steps] * len(wanted))
        lesson = Lesson(
            decoder=decoder,
            teacher=teacher,
            windows=windows,
            method=method,
            steps=steps,
            workspace=Workspace(work_dir, checkpoint.fingerprint),
            start=start,
        )
        provenance = {
            **source,
            **({} if start is None else {"start": f"vectors of {checkpoint.name} before rounding"}),
            "samples": len(windows),
            "seq_len": windows.shape[1],
            "steps": steps,
            "dense": dense,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "teal": __version__,
            "torch": torch.__version__,
            "device": str(decoder.device),
        }
        artifacts.remove_leftovers(path)
        # A profile that teal brings becomes the model's own, of these very weights.
        profile = dataclasses.replace(profile, fingerprint=checkpoint.fingerprint)
        with pipeline.broken_off(
            reporter, lambda: "the targets that are done, and the steps of this one, are"
        ):
            recover(
                profile,
                lesson,
                wanted,
                provenance,
                keep=lambda found: found.save(path),
                reporter=reporter,
            )
        with artifacts.spent(work_dir):
            pass
        reporter.expect(())
    return Profile.load(path)


def _settings(profile: Profile, method: str) -> dict[str, Any]:
    """Of the text that the vectors which are there were learnt from, as far as it is known."""
    known = profile.recovery.get(method)
    found: dict[str, Any] = {} if known is None else known.provenance.get("settings", {})
    return found


def _teacher(checkpoint: Checkpoint, decoder: Decoder, reporter: Reporter) -> tuple[Decoder, str]:
    """The dense model to learn from, and its fingerprint."""
    if checkpoint.quantization is None:
        return decoder, checkpoint.fingerprint
    floats = stored.unquantized(checkpoint)
    if floats is None:
        reporter.note(
            "the unquantized model is not here, so that what rounding lost stays lost: "
            f"`teal convert {checkpoint.name}` brings it"
        )
        return decoder, checkpoint.fingerprint
    return streaming.load(floats, decoder.device, reporter), floats.fingerprint
