"""What a benchmark found, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from statistics import fmean
from typing import Any, Literal

from teal_cli.benchmark.bandwidth import Bandwidth, ceiling
from teal_cli.benchmark.cost import TokenBytes, token_bytes
from teal_cli.benchmark.timing import Run, Spread, speedup, spread
from teal_cli.inference.guesses import DraftCounts
from teal_cli.model.config import ModelConfig
from teal_cli.model.quantization import Quantization

SCHEMA = 1
DENSE = "dense"

# What the others' speed-ups are over.
REFERENCES = ("dense", "baseline")

Kind = Literal["dense", "sparse", "draft", "baseline"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing that is measured."""

    label: str
    kind: Kind
    dtype: str
    itemsize: int
    backend: str  # what computes
    target_sparsity: float | None = None
    quantization: Quantization | None = None
    bytes_per_token: int | None = None  # where it is not a matter of the above


@dataclass(frozen=True, slots=True)
class CardRow:
    """What a token costs at one sparsity, before anything is run."""

    sparsity: float
    bytes: TokenBytes
    ceiling_tokens_per_s: float  # at the measured bandwidth, if nothing else took time


@dataclass(frozen=True, slots=True)
class Row:
    """One variant's figures: medians over the repeats, with the 20th and 80th percentiles."""

    label: str
    kind: Kind
    dtype: str
    backend: str
    target_sparsity: float | None
    realised_sparsity: float | None
    tokens_per_s: Spread
    time_per_token_ms: Spread
    prompt_tokens_per_s: Spread  # tokens of the prompt over the time to the first token
    time_to_first_token_ms: Spread
    bytes_per_token: int
    bandwidth_share: float  # of the ceiling, at most 1 where a pass gives one token
    speedup: dict[str, Spread]  # over each reference, from the pairs of one repeat
    acceptance: float | None = None  # share of the guesses that were taken; None without any
    tokens_per_round: float | None = None  # that a pass over guesses gave


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that a benchmark found, and what is needed to repeat it."""

    model: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    bandwidth: Bandwidth
    card: tuple[CardRow, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    kind: str = field(default="bench", init=False)
    schema: int = field(default=SCHEMA, init=False)


def cost_card(
    config: ModelConfig,
    bandwidth: Bandwidth,
    *,
    itemsize: int,
    quantization: Quantization | None = None,
    position: int,
    sparsities: Sequence[float],
) -> tuple[CardRow, ...]:
    """Bytes and ceiling of a dense token, then at each sparsity."""
    rows = []
    for sparsity in (0.0, *(value for value in sparsities if value > 0)):
        cost = token_bytes(
            config, itemsize=itemsize, kind=quantization, sparsity=sparsity, position=position
        )
        rows.append(CardRow(sparsity, cost, bandwidth.bytes_per_s / cost.total))
    return tuple(rows)


def rows(
    variants: Sequence[Variant],
    runs: Mapping[str, Sequence[Run]],
    config: ModelConfig,
    reads: Sequence[Bandwidth],
    *,
    prompt_tokens: int,
    position: int,
) -> tuple[Bandwidth, tuple[Row, ...]]:
    """The ceiling, and the figures of every variant.

    Args:
        variants: our dense decoding and the baselines are references to the others.
        runs: by label, as many for each.
        config: the model's.
        reads: the machine's bandwidth as it was measured beside the runs.
        prompt_tokens: tokens of the prompt.
        position: mean position of the decoded tokens, for the cache's bytes.
    """
    references = [v.label for v in variants if v.kind in REFERENCES]
    realised = {
        variant.label: fmean(run.realised_sparsity or 0.0 for run in runs[variant.label])
        for variant in variants
        if variant.kind == "sparse"
    }
    sizes = {
        variant.label: variant.bytes_per_token
        or token_bytes(
            config,
            itemsize=variant.itemsize,
            kind=variant.quantization,
            sparsity=realised.get(variant.label, 0.0),
            position=position,
        ).total
        for variant in variants
    }
    bandwidth = ceiling(
        reads,
        {
            v.label: sizes[v.label] / min(run.time_per_token_s for run in runs[v.label])
            for v in variants
            if v.kind != "draft"
        },
    )
    found = []
    for variant in variants:
        mine = runs[variant.label]
        times = spread([run.time_per_token_s for run in mine])
        first = spread([run.time_to_first_token_s for run in mine])
        size = sizes[variant.label]
        counts = [run.draft for run in mine if run.draft is not None]
        draft = reduce(add, counts, DraftCounts())
        found.append(
            Row(
                label=variant.label,
                kind=variant.kind,
                dtype=variant.dtype,
                backend=variant.backend,
                target_sparsity=variant.target_sparsity,
                realised_sparsity=realised.get(variant.label),
                tokens_per_s=_rate(1, times),
                time_per_token_ms=_milliseconds(times),
                prompt_tokens_per_s=_rate(prompt_tokens, first),
                time_to_first_token_ms=_milliseconds(first),
                bytes_per_token=size,
                bandwidth_share=size / times.median / bandwidth.bytes_per_s,
                speedup={
                    label: speedup(mine, runs[label])
                    for label in references
                    if label != variant.label
                },
                acceptance=draft.acceptance,
                tokens_per_round=draft.tokens_per_round,
            )
        )
    return bandwidth, tuple(found)


def _rate(tokens: int, seconds: Spread) -> Spread:
    return Spread(tokens / seconds.median, tokens / seconds.high, tokens / seconds.low)


def _milliseconds(seconds: Spread) -> Spread:
    return Spread(seconds.median * 1e3, seconds.low * 1e3, seconds.high * 1e3)
