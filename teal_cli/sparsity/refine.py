"""Targets that the sparse model realises on its own activations.

Sparse layers feed smaller activations to the next ones, so that thresholds taken from the dense
model drop more than they should: 0.516 at a target of 0.5 on SmolLM2-135M. A little less is asked
of the dense distributions, the same of all projections. Thresholds that each drop what the
allocation says on the sparse model itself do worse: a projection whose inputs have shrunk then
drops what carries more.
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
REFINED_WINDOWS = 4


def refine(
    decoder: Decoder,
    windows: Tensor,
    profile: Profile,
    methods: Sequence[str],
    workspace: Workspace,
    reporter: Reporter,
) -> dict[str, Tensor]:
    """What to add to a target for the sparse model to realise it, float64 [REFINED_TARGETS] each.

    The sparse model is compared with the dense one on the same few windows, whose own
    distribution is not quite the profile's.
    """
    windows = windows[:REFINED_WINDOWS]
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

    The sparse model runs once a target, asked for what the target before suggests. That guess is
    off by little, so that the activations then seen are as good as those at the target found.
    """
    offsets = torch.zeros(len(REFINED_TARGETS), dtype=torch.float64)
    guess, before = 0.0, REFINED_TARGETS[0]
    for index, target in enumerate(REFINED_TARGETS):
        if target > profile.reach(method):
            offsets[index:] = guess
            break
        # Error grows with the square of the threshold, and the offset with it.
        asked = target + guess * (target / before) ** 2
        thresholds = dense.thresholds(profile.allocation(asked, method)).float()
        states = workspace.states(f"{method}-{target:g}", decoder, windows, depends_on=thresholds)
        label = f"{method} at {target:g}"
        counts = collect(
            decoder, windows, states, thresholds=thresholds, label=label, reporter=reporter
        )
        own = Quantiles.from_counts(counts)
        low, high = 0.0, profile.reach(method)
        for _ in range(40):
            asked = (low + high) / 2
            drops = own.sparsity(dense.thresholds(profile.allocation(asked, method)))
            low, high = (asked, high) if profile.model_sparsity(drops) < target else (low, asked)
        guess, before = asked - target, target
        offsets[index] = guess
    return offsets
