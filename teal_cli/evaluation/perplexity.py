"""Perplexity, divergence and agreement of sparse settings against the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.evaluation import statistics
from teal_cli.evaluation.protocols import Protocol
from teal_cli.evaluation.statistics import Estimate
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.sparsity.skips import SkipCount

# Logits held at a time for one setting: 64 MB of float32.
LOGITS_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class WindowScores:
    """One entry a window, in the text's order: means over its scored tokens."""

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    total_variation: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """What one setting scored; the comparisons are with the dense model on the same windows."""

    label: str
    nll: Estimate  # nats a token
    perplexity: Estimate
    perplexity_gap: Estimate
    kl: Estimate  # KL(dense || this), nats a token
    agreement: Estimate  # share of positions with the same likeliest token
    total_variation: Estimate  # half the sum of abs(p - q), from 0 to 1
    realised_sparsity: float  # weighted by the weights that each input feeds
    realised_by_site: dict[str, float]
    realised_by_projection: dict[str, float]
    by_window: WindowScores


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
    """What one setting has shown so far: one entry a window, and the inputs that it skipped."""

    decoder: Decoder
    setting: Setting
    count: SkipCount
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    total_variation: list[float] = field(default_factory=list)


@torch.inference_mode()
def evaluate(
    decoder: Decoder,
    windows: Tensor,
    settings: Sequence[Setting],
    protocol: Protocol,
    reporter: Reporter,
    *,
    decoders: Mapping[str, Decoder] | None = None,
) -> EvalResult:
    """Score the dense model and every other setting on the same windows.

    Args:
        decoder: the model.
        windows: int64 [N, protocol.window].
        settings: what to compare with the dense model; some may be dense models of another form.
        protocol: which positions are sparse, and which tokens are scored.
        reporter: follows the passes through the model.
        decoders: by label, of settings that are of another form of the model, such as a
            quantized one.

    Raises:
        TealError: a loss is not finite.
    """
    others = decoders or {}
    tallies = []
    for setting in (DENSE, *settings):
        own = others.get(setting.label, decoder)
        tallies.append(_Tally(own, setting, SkipCount(own, setting.thresholds)))
    passes = len(windows) * len(tallies)
    with reporter.task("evaluating", total=passes, unit="passes") as task:
        for window in windows:
            hidden = []
            for tally in tallies:
                hidden.append(_scored_states(window, tally, protocol))
                task.advance()
            _score(hidden, window[protocol.scored_from :].to(decoder.device), tallies)
    dense, *sparse = (_quality(tally, tallies[0].nll) for tally in tallies)
    return EvalResult(
        protocol, len(windows), len(windows) * protocol.scored, dense=dense, sparse=tuple(sparse)
    )


def _scored_states(window: Tensor, tally: _Tally, protocol: Protocol) -> Tensor:
    """Final hidden states that predict the scored tokens, [scored, hidden_size]."""
    hidden = tally.decoder.forward(
        window[:-1],  # nothing is asked of the last token
        thresholds=tally.setting.thresholds,
        vectors=tally.setting.vectors,
        sparse_from=protocol.sparse_from,
        observe=tally.count.observer(protocol.sparse_from),
    )
    return hidden[protocol.scored_from - 1 :]


def _score(hidden: Sequence[Tensor], targets: Tensor, tallies: Sequence[_Tally]) -> None:
    """Add a window's scores to the tallies, the first of which is the dense model's.

    The logits of a few positions are computed at a time, and of one sparse setting.
    """
    decoder = tallies[0].decoder
    rows = max(1, LOGITS_CHUNK // decoder.config.vocab_size)
    sums = torch.zeros(4, len(tallies), dtype=torch.float64, device=decoder.device)
    for start in range(0, len(targets), rows):
        wanted = targets[start : start + rows, None]
        dense = torch.log_softmax(decoder.logits(hidden[0][start : start + rows]), dim=-1)
        best = dense.argmax(-1)
        sums[0, 0] -= dense.gather(-1, wanted).double().sum()
        sums[2, 0] += len(wanted)
        shares = dense.exp()
        for index in range(1, len(tallies)):
            logits = tallies[index].decoder.logits(hidden[index][start : start + rows])
            ours = torch.log_softmax(logits, dim=-1)
            sums[0, index] -= ours.gather(-1, wanted).double().sum()
            sums[2, index] += (ours.argmax(-1) == best).sum()
            # Row sums in float32 stay exact to 1e-6 nats; the rows are then added in float64.
            sums[1, index] += torch.sub(dense, ours).mul_(shares).sum(-1).double().sum()
            sums[3, index] += ours.exp_().sub_(shares).abs_().sum(-1).double().sum() / 2
    for tally, means in zip(tallies, (sums / len(targets)).T.tolist(), strict=True):
        nll, kl, agreement, variation = means
        check_finite(nll, tally.setting)
        tally.nll.append(nll)
        tally.kl.append(kl)
        tally.agreement.append(agreement)
        tally.total_variation.append(variation)


def check_finite(loss: float, setting: Setting) -> None:
    """Make sure that a loss is a number.

    Raises:
        TealError: it is not; the message names the setting.
    """
    if not math.isfinite(loss):
        dense = setting is DENSE
        name = "dense model" if dense else f"sparse model ({setting.label})"
        raise TealError(
            f"the loss of the {name} is not finite",
            hint="The weights overflow in this dtype: try --dtype bfloat16 or float32."
            if dense
            else "Ask for less sparsity, or for another --method.",
        )


def _quality(tally: _Tally, dense_nll: list[float]) -> Quality:
    skips = tally.count.skips()
    return Quality(
        label=tally.setting.label,
        nll=statistics.mean(tally.nll),
        perplexity=statistics.perplexity(tally.nll),
        perplexity_gap=statistics.perplexity_gap(tally.nll, dense_nll),
        kl=statistics.mean(tally.kl),
        agreement=statistics.mean(tally.agreement),
        total_variation=statistics.mean(tally.total_variation),
        realised_sparsity=skips.realised_sparsity,
        realised_by_site=skips.by_site(),
        realised_by_projection=skips.by_projection(),
        by_window=WindowScores(
            tuple(tally.nll),
            tuple(tally.kl),
            tuple(tally.agreement),
            tuple(tally.total_variation),
        ),
    )


def scores(quality: Quality) -> dict[str, Any]:
    """A setting's figures as one flat object, standard errors beside their values."""
    flat: dict[str, Any] = {}
    for name in ("perplexity", "perplexity_gap", "nll", "kl", "agreement", "total_variation"):
        estimate: Estimate = getattr(quality, name)
        flat |= statistics.flat(name, estimate)
    return {
        **flat,
        "realised_sparsity": quality.realised_sparsity,
        "realised_by_site": quality.realised_by_site,
        "realised_by_projection": quality.realised_by_projection,
        "by_window": asdict(quality.by_window),
    }
