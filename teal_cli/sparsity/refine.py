"""Thresholds that realise their sparsity on the sparse model's own activations.

Sparse layers feed smaller activations to the next ones, so that thresholds taken from the dense
model drop more than they should: 0.516 at a target of 0.5 on SmolLM2-135M. The allocation stays;
what is asked of the dense distribution to realise it is stored as an offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.observe import collect
from teal_cli.sparsity.profile import REFINED_TARGETS, Profile
from teal_cli.sparsity.quantiles import Quantiles
from teal_cli.sparsity.workspace import Workspace

# 2,000 tokens of a layer are more than a million activations.
_WINDOWS = 4


def refine(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    methods: Sequence[str],
    workspace: Workspace,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """Offsets of methods at REFINED_TARGETS, float64 [targets, num_hidden_layers, 7] each.

    The sparse model is compared with the dense one on the same few windows, whose own
    distribution is not quite the profile's.
    """
    windows = windows[:_WINDOWS]
    states = workspace.states("dense", decoder, windows)
    counts = collect(decoder, windows, states, label="dense", reporter=reporter)
    dense = Quantiles.from_counts(counts)
    return {
        method: _offsets(decoder, windows, profile, dense, method, workspace, reporter)
        for method in methods
    }


def _offsets(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    dense: Quantiles,
    method: str,
    workspace: Workspace,
    reporter: Reporter,
) -> Tensor:
    """One method's offsets.

    The sparse model runs once a target, at thresholds that the target before suggests; their own
    error is small and falls out, because the quantiles are taken of what was then seen.
    """
    offsets = torch.zeros(len(REFINED_TARGETS), *dense.limit.shape, dtype=torch.float64)
    guess, before = torch.zeros_like(dense.limit), REFINED_TARGETS[0]
    for index, target in enumerate(REFINED_TARGETS):
        if target > profile.reach(method):
            offsets[index:] = guess
            break
        allocation = profile.allocation(target, method)
        # Error grows with the square of the threshold, and the offset with it.
        asked = allocation + guess * (target / before) ** 2
        thresholds = dense.thresholds(asked.clamp(0, 1)).float()
        states = workspace.states(f"{method}-{target:g}", decoder, windows, depends_on=thresholds)
        label = f"{method} at {target:g}"
        counts = collect(
            decoder, windows, states, thresholds=thresholds, label=label, reporter=reporter
        )
        own = Quantiles.from_counts(counts).thresholds(allocation)
        guess, before = dense.sparsity(own) - allocation, target
        offsets[index] = guess
    return offsets
