"""Calibration: text through the model layer by layer, into histograms of abs(x).

Windows go through one layer at a time, one after the other, so that memory holds one layer's
activations of one window; histograms are all that stays of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal_cli import __version__
from teal_cli.errors import TealError, UsageError
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import SITES
from teal_cli.progress import Reporter
from teal_cli.sparsity import histogram
from teal_cli.sparsity.profile import ModelShape, Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.spool import DiskStates, MemoryStates, States

# The first positions of a context are attention sinks (arXiv 2309.17453): activations there are
# up to a thousand times the usual ones, and decoding after a prompt never sees them.
SKIPPED_POSITIONS = 4


def calibrate(
    decoder: Decoder,
    windows: Tensor,
    *,
    model: str,
    fingerprint: str | None = None,
    allocations: Mapping[str, Tensor] | None = None,
    provenance: Mapping[str, Any] | None = None,
    work_dir: Path | None = None,
    reporter: Reporter,
) -> Profile:
    """Make a profile from a model's activations on `windows`, dense.

    Args:
        decoder: the model.
        windows: int64 [N, T], more than SKIPPED_POSITIONS tokens each.
        model: its name.
        fingerprint: its checkpoint's.
        allocations: tables that are known already, as in `Profile`.
        provenance: what the windows are; tokens, date and versions are added.
        work_dir: keeps hidden states, and resumes what an earlier, killed run left in it with
            the same result; remove it once the profile is saved. None works in memory.
        reporter: follows the layers.

    Raises:
        UsageError: the windows are too short, or longer than the model's context.
        TealError: an activation is not finite, or the disk is full.
    """
    count, length = windows.shape
    if not SKIPPED_POSITIONS < length <= decoder.config.max_position_embeddings:
        raise UsageError(
            f"windows of {length} tokens are out of range: from {SKIPPED_POSITIONS + 1} to "
            f"{decoder.config.max_position_embeddings} fit this model"
        )
    with torch.no_grad():
        states: States = MemoryStates()
        if work_dir is not None:
            like = decoder.embed(windows[0])
            key = _run_key(decoder, windows, fingerprint)
            states = DiskStates(work_dir, key=key, like=like, count=count)
        counts = _collect(decoder, windows, states, reporter)
    return Profile(
        model=model,
        fingerprint=fingerprint,
        shape=ModelShape.of(decoder.config),
        quantiles=Quantiles.from_counts(counts),
        counts=counts,
        allocations=allocations or {},
        provenance={
            **(provenance or {}),
            "samples": count,
            "seq_len": length,
            "tokens": count * (length - SKIPPED_POSITIONS),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "teal": __version__,
            "torch": torch.__version__,
            "device": str(decoder.device),
        },
    )


def _collect(decoder: Decoder, windows: Tensor, states: States, reporter: Reporter) -> Tensor:
    """Histograms of every layer and site, int64 [num_hidden_layers, 4, BINS] on the CPU."""
    layers = decoder.config.num_hidden_layers
    counts = torch.zeros(layers, len(SITES), histogram.BINS, dtype=torch.int64)
    done = states.resume()
    first = 0 if done is None else len(done)
    if done is not None:
        counts[:first] = done
        reporter.note(f"resuming at layer {first + 1} of {layers}")
    with reporter.task("calibrating", total=layers, unit="layers") as task:
        task.advance(first)
        for layer in range(first, layers):
            inputs = (decoder.embed(row) for row in windows) if layer == 0 else states.read(layer)
            outputs = _observed(decoder, layer, inputs, counts[layer])
            if layer + 1 < layers:
                states.write(layer + 1, outputs)
                states.finish_layer(counts[: layer + 1])
            else:
                for _ in outputs:
                    pass
            task.advance()
    return counts


def _observed(
    decoder: Decoder, layer: int, inputs: Iterator[Tensor], counts: Tensor
) -> Iterator[Tensor]:
    """A layer's outputs; what it sees at its sites is added to `counts`, [4, BINS]."""

    def observe(_: int, site: str, x: Tensor) -> None:
        seen = x[SKIPPED_POSITIONS:]
        # The sum tells as much as isfinite() does of every element, in a tenth of the time.
        if not seen.sum(dtype=torch.float32).isfinite():
            raise TealError(
                f"layer {layer}, site {site}: an activation is not finite",
                hint="The weights overflow in this dtype; try --dtype bfloat16 or float32.",
            )
        counts[SITES.index(site)] += histogram.count(seen).cpu()

    for hidden in inputs:
        yield decoder.layer(layer, hidden, observe=observe)


def _run_key(decoder: Decoder, windows: Tensor, fingerprint: str | None) -> str:
    """Names everything that the hidden states between layers depend on."""
    what = f"{fingerprint} {decoder.config} {decoder.device} {decoder.dtype} {torch.__version__}"
    digest = hashlib.sha256(what.encode())
    digest.update(windows.contiguous().numpy().tobytes())
    return digest.hexdigest()
