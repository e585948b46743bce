"""Perplexity, divergence and agreement of sparse settings against the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.evaluation import statistics
from teal_cli.evaluation.protocols import Protocol
from teal_cli.evaluation.statistics import Estimate
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.progress import Reporter

Setting = tuple[str, Tensor | None]  # label, thresholds [num_hidden_layers, 7] or None for dense

# Logits held at a time for one setting: 64 MB of float32.
_LOGITS_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Quality:
    """What one setting scored; the comparisons are with the dense model on the same windows."""

    label: str
    nll: Estimate  # nats a token
    perplexity: Estimate
    perplexity_gap: Estimate
    kl: Estimate  # KL(dense || this), nats a token
    agreement: Estimate  # share of positions with the same likeliest token
    realised_sparsity: float  # weighted by the weights that each input feeds
    realised_by_site: dict[str, float]
    realised_by_projection: dict[str, float]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Dense and sparse quality on the same windows."""

    protocol: Protocol
    windows: int
    scored_tokens: int
    dense: Quality
    sparse: tuple[Quality, ...]


@dataclass(slots=True)
class _Tally:
    """What one setting has shown so far: one entry a window, and the channels that were kept."""

    label: str
    thresholds: Tensor | None
    kept: Tensor  # int64 [num_hidden_layers, 7]
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    decoder: Decoder,
    windows: Tensor,
    settings: Sequence[Setting],
    protocol: Protocol,
    reporter: Reporter,
) -> EvalResult:
    """Score the dense model and every sparse setting on the same windows.

    Args:
        decoder: the model.
        windows: int64 [N, protocol.window].
        settings: what to compare with the dense model.
        protocol: which positions are sparse, and which tokens are scored.
        reporter: follows the passes through the model.

    Raises:
        TealError: a loss is not finite.
    """
    shape = (decoder.config.num_hidden_layers, len(PROJECTIONS))
    tallies = [
        _Tally(label, thresholds, torch.zeros(shape, dtype=torch.int64, device=decoder.device))
        for label, thresholds in (("dense", None), *settings)
    ]
    passes = len(windows) * len(tallies)
    with reporter.task("evaluating", total=passes, unit="passes") as task:
        for window in windows:
            hidden = []
            for tally in tallies:
                hidden.append(_scored_states(decoder, window, tally, protocol))
                task.advance()
            _score(decoder, hidden, window[protocol.scored_from :].to(decoder.device), tallies)
    sparse_positions = len(windows) * (protocol.window - 1 - protocol.sparse_from)
    dense, *sparse = (
        _quality(tally, tallies[0].nll, decoder.config, sparse_positions) for tally in tallies
    )
    return EvalResult(
        protocol, len(windows), len(windows) * protocol.scored, dense=dense, sparse=tuple(sparse)
    )


def _scored_states(decoder: Decoder, window: Tensor, tally: _Tally, protocol: Protocol) -> Tensor:
    """Final hidden states that predict the scored tokens, [scored, hidden_size]."""
    thresholds = tally.thresholds

    def count(layer: int, site: str, x: Tensor) -> None:
        assert thresholds is not None
        size = x[protocol.sparse_from :].abs().float()
        counted: dict[float, Tensor] = {}  # projections of a site often share a threshold
        for index, name in enumerate(PROJECTIONS):
            if SITE_OF[name] == site:
                level = float(thresholds[layer, index])
                if level not in counted:
                    counted[level] = (size > level).sum()
                tally.kept[layer, index] += counted[level]

    hidden = decoder.forward(
        window[:-1],  # nothing is asked of the last token
        thresholds=thresholds,
        sparse_from=protocol.sparse_from,
        observe=None if thresholds is None else count,
    )
    return hidden[protocol.scored_from - 1 :]


def _score(
    decoder: Decoder, hidden: Sequence[Tensor], targets: Tensor, tallies: Sequence[_Tally]
) -> None:
    """Add a window's scores to the tallies, the first of which is the dense model's.

    The logits of a few positions are computed at a time, and of one sparse setting.
    """
    rows = max(1, _LOGITS_CHUNK // decoder.config.vocab_size)
    sums = torch.zeros(3, len(tallies), dtype=torch.float64, device=decoder.device)
    for start in range(0, len(targets), rows):
        wanted = targets[start : start + rows, None]
        dense = torch.log_softmax(decoder.logits(hidden[0][start : start + rows]), dim=-1)
        best = dense.argmax(-1)
        sums[0, 0] -= dense.gather(-1, wanted).double().sum()
        sums[2, 0] += len(wanted)
        shares = dense.exp()
        for index in range(1, len(tallies)):
            ours = torch.log_softmax(decoder.logits(hidden[index][start : start + rows]), dim=-1)
            sums[0, index] -= ours.gather(-1, wanted).double().sum()
            sums[2, index] += (ours.argmax(-1) == best).sum()
            # Row sums in float32 stay exact to 1e-6 nats; the rows are then added in float64.
            sums[1, index] += torch.sub(dense, ours).mul_(shares).sum(-1).double().sum()
    for tally, (nll, kl, agreement) in zip(tallies, (sums / len(targets)).T.tolist(), strict=True):
        if nll != nll or abs(nll) == float("inf"):
            raise TealError(
                f"the loss of the {tally.label} model is not finite",
                hint="The weights overflow in this dtype: try --dtype bfloat16 or float32."
                if tally.thresholds is None
                else "Ask for less sparsity.",
            )
        tally.nll.append(nll)
        tally.kl.append(kl)
        tally.agreement.append(agreement)


def _quality(tally: _Tally, dense_nll: list[float], config: ModelConfig, positions: int) -> Quality:
    sizes = {name: i * o for name, (i, o) in config.projection_shapes.items()}
    inputs = torch.tensor([i for i, _ in config.projection_shapes.values()])
    realised = torch.zeros(len(PROJECTIONS), dtype=torch.float64)
    if tally.thresholds is not None:
        realised = 1 - tally.kept.cpu().double().mean(0) / (positions * inputs)
    by_projection = dict(zip(PROJECTIONS, realised.tolist(), strict=True))

    def weighted(names: Sequence[str]) -> float:
        total = sum(sizes[name] for name in names)
        return sum(by_projection[name] * sizes[name] for name in names) / total

    return Quality(
        label=tally.label,
        nll=statistics.mean(tally.nll),
        perplexity=statistics.perplexity(tally.nll),
        perplexity_gap=statistics.perplexity_gap(tally.nll, dense_nll),
        kl=statistics.mean(tally.kl),
        agreement=statistics.mean(tally.agreement),
        realised_sparsity=weighted(PROJECTIONS),
        realised_by_site={
            site: weighted([name for name in PROJECTIONS if SITE_OF[name] == site])
            for site in SITES
        },
        realised_by_projection=by_projection,
    )


def scores(quality: Quality) -> dict[str, Any]:
    """A setting's figures as one flat object, standard errors beside their values."""
    flat: dict[str, Any] = {}
    for name in ("perplexity", "perplexity_gap", "nll", "kl", "agreement"):
        estimate: Estimate = getattr(quality, name)
        flat[name] = estimate.value
        flat[f"{name}_standard_error"] = estimate.standard_error
    return {
        **flat,
        "realised_sparsity": quality.realised_sparsity,
        "realised_by_site": quality.realised_by_site,
        "realised_by_projection": quality.realised_by_projection,
    }
