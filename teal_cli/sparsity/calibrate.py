"""Calibration: text through the model layer by layer, into histograms of abs(x), then methods.

Windows go through one layer at a time, one after the other, so that memory holds one layer's
activations of one window; histograms are all that stays of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity import greedy, sensitivity
from teal_cli.sparsity.observe import SKIPPED_POSITIONS, collect
from teal_cli.sparsity.profile import METHODS, REFINED_TARGETS, Profile, check_method
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.refine import REFINED_WINDOWS, refine
from teal_cli.sparsity.shape import ModelShape
from teal_cli.sparsity.workspace import Workspace
from teal_cli.version import __version__

_ALLOCATE = {"sensitivity": sensitivity.allocate, "greedy": greedy.allocate}


def calibrate(
    decoder: Decoder,
    windows: Tensor,
    *,
    model: str,
    fingerprint: str | None = None,
    methods: Sequence[str] = (),
    base: Profile | None = None,
    allocations: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work_dir: Path | None = None,
    reporter: Reporter,
) -> Profile:
    """Make a profile from a model's activations on `windows`.

    Args:
        decoder: the model.
        windows: int64 [N, T], more than SKIPPED_POSITIONS tokens each.
        model: its name.
        fingerprint: its checkpoint's.
        methods: of METHODS; each gets its allocation, and thresholds that realise their target
            on the sparse model. None takes histograms of the dense model only.
        base: a profile of these windows, whose histograms and methods are kept.
        allocations: tables that are known already, as in `Profile`.
        provenance: what the windows are; tokens, date and versions are added.
        work_dir: keeps hidden states, and resumes what an earlier, killed run left in it with
            the same result; remove it once the profile is saved. None works in memory.
        reporter: follows the layers.

    Raises:
        UsageError: the windows are too short, or longer than the model's context; no such method.
        TealError: an activation or the loss is not finite, or the disk is full.
    """
    _check(decoder, windows, methods)
    workspace = Workspace(work_dir, fingerprint)
    with torch.no_grad():
        profile = base
        if profile is None:
            # What the backward pass of `sensitivity` needs waits from here on.
            states = workspace.dense_states(decoder, windows, keep_all="sensitivity" in methods)
            counts = collect(decoder, windows, states, label="calibrating", reporter=reporter)
            profile = Profile(
                model=model,
                fingerprint=fingerprint,
                shape=ModelShape.of(decoder.config),
                quantiles=Quantiles.from_counts(counts),
                counts=counts,
                allocations=allocations or {},
            )
        for method in methods:
            if method in _ALLOCATE and method not in profile.allocations:
                table = _ALLOCATE[method](decoder, windows, profile, workspace, reporter)
                known = {**profile.allocations, method: table}
                ordered = {name: known[name] for name in METHODS if name in known}
                profile = dataclasses.replace(profile, allocations=ordered)
        if missing := [method for method in methods if method not in profile.offsets]:
            found = refine(decoder, windows, profile, missing, workspace, reporter)
            profile = dataclasses.replace(profile, offsets={**profile.offsets, **found})
    made = {
        "samples": len(windows),
        "seq_len": windows.shape[1],
        "tokens": len(windows) * (windows.shape[1] - SKIPPED_POSITIONS),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "teal": __version__,
        "torch": torch.__version__,
        "device": str(decoder.device),
    }
    return dataclasses.replace(profile, provenance={**(provenance or {}), **made})


def costs(
    samples: int,
    methods: Sequence[str],
    *,
    base: Profile | None = None,
    allocations: Mapping[str, Tensor] | None = None,
) -> list[float | None]:
    """What each task of `calibrate` with a folder costs, in windows through the model.

    None is not known. Arguments are as for `calibrate`, with how many windows there are.
    """
    known = (allocations or {}) if base is None else base.allocations
    found: list[float | None] = [] if base is not None else [samples]
    if "sensitivity" in methods and "sensitivity" not in known:
        # The histograms' pass has left the forward one in the folder.
        found += [0 if base is None else samples, sensitivity.BACKWARD_COST * samples]
    if "greedy" in methods and "greedy" not in known:
        found.append(None)
    missing = [name for name in methods if base is None or name not in base.offsets]
    if missing:
        passes = 1 + len(missing) * len(REFINED_TARGETS)
        found += [float(min(samples, REFINED_WINDOWS))] * passes
    return found


def _check(decoder: Decoder, windows: Tensor, methods: Iterable[str]) -> None:
    length = windows.shape[1]
    if not SKIPPED_POSITIONS < length <= decoder.config.context_length:
        raise UsageError(
            f"windows of {length} tokens are out of range: from {SKIPPED_POSITIONS + 1} to "
            f"{decoder.config.context_length} fit this model"
        )
    for method in methods:
        check_method(method)
