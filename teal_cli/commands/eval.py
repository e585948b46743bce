"""`teal eval`: what sparsity costs in quality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli import console
from teal_cli.options import (
    ColumnOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    OfflineOption,
    RevisionOption,
    SparsitiesOption,
    TokenOption,
    parse_sparsities,
)

if TYPE_CHECKING:
    from teal_cli.evaluation.perplexity import EvalResult, Quality
    from teal_cli.evaluation.statistics import Estimate

ProtocolOption = Annotated[
    Literal["standard", "teal"],
    typer.Option(
        "--protocol",
        help="'standard': every token of a window scored, all but the first few positions sparse."
        " 'teal': 512 tokens scored after 2048 of context, the last half sparse, as published."
        " Their figures do not compare.",
    ),
]
SamplesOption = Annotated[
    int, typer.Option("--samples", min=0, help="Windows of text to score; 0 is the whole text.")
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens in a window of the standard protocol."
        " [default: 2048, or the model's if shorter]",
    ),
]


def evaluate(
    model: ModelArgument = None,
    sparsity: SparsitiesOption = "0.25,0.4,0.5",
    protocol: ProtocolOption = "standard",
    dataset: DatasetOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = 8,
    context: ContextOption = None,
    method: MethodOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Compare a model's quality, dense and sparse, on text that calibration did not see.

    Perplexity, KL divergence to the dense model in nats a token, and the share of positions
    where both find the same token likeliest, each with its standard error over the windows.
    """
    sparsities = parse_sparsities(sparsity)
    reporter = console.reporter()

    from teal_cli import pipeline
    from teal_cli.environment import environment
    from teal_cli.evaluation import perplexity, protocols
    from teal_cli.inference.device import pick_device
    from teal_cli.store import models
    from teal_cli.text.corpora import load_corpus
    from teal_cli.text.windows import windows

    target_device = pick_device(device)
    checkpoint = pipeline.ensure_checkpoint(
        models.resolve(model, revision),
        dtype=dtype,
        token=token,
        offline=offline,
        reporter=reporter,
    )
    plan = protocols.protocol(protocol, checkpoint.config, context)
    profile = pipeline.ensure_profile(checkpoint, device=device, offline=offline, reporter=reporter)
    settings = [(f"sparse {value:.4g}", profile.thresholds(value, method)) for value in sparsities]
    corpus = load_corpus(
        dataset,
        split_role="evaluation",
        column=column,
        offline=offline,
        calibrated_on=profile.provenance.get("dataset_fingerprint"),
        reporter=reporter,
    )
    tokenizer = checkpoint.tokenizer()
    text = plan.cut(
        lambda length, count: windows(tokenizer, corpus, seq_len=length, samples=count),
        samples or None,
    )
    decoder = checkpoint.load(target_device)
    result = perplexity.evaluate(decoder, text, settings, plan, reporter)
    if not json:
        _print_tables(f"{checkpoint.name} on {corpus.name} ({corpus.part})", result)
        return
    inputs = {
        "model": {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
        },
        "dataset": {
            "name": corpus.name,
            "part": corpus.part,
            "column": column,
            "fingerprint": corpus.fingerprint,
        },
        "profile": {
            "method": method or profile.default_method,
            "provenance": dict(profile.provenance),
        },
        "environment": environment(target_device),
    }
    console.print_json(_document(inputs, result, sparsities))


def _document(
    inputs: dict[str, Any], result: EvalResult, sparsities: tuple[float, ...]
) -> dict[str, Any]:
    """The result with everything that is needed to repeat it."""
    from dataclasses import asdict

    from teal_cli.evaluation.perplexity import scores

    return {
        "kind": "eval",
        "schema": 1,
        **inputs,
        "protocol": asdict(result.protocol),
        "windows": result.windows,
        "scored_tokens": result.scored_tokens,
        "dense": scores(result.dense),
        "sparse": [
            {"target_sparsity": target, **scores(quality)}
            for target, quality in zip(sparsities, result.sparse, strict=True)
        ],
    }


def _print_tables(title: str, result: EvalResult) -> None:
    plan = result.protocol
    console.print_table(
        ["", "realised", "perplexity", "to dense", "KL (nats/token)", "same top token"],
        [_line(quality, dense=quality is result.dense) for quality in _all(result)],
        title=f"{title}, protocol {plan.name}: {result.windows} windows of {plan.window} tokens, "
        f"{result.scored_tokens} scored",
    )
    print()
    console.print_table(
        ["realised by site", *result.dense.realised_by_site],
        [
            [quality.label, *(f"{share:.3f}" for share in quality.realised_by_site.values())]
            for quality in result.sparse
        ],
    )


def _all(result: EvalResult) -> tuple[Quality, ...]:
    return (result.dense, *result.sparse)


def _line(quality: Quality, *, dense: bool) -> list[str]:
    shown = [quality.label, f"{quality.realised_sparsity:.3f}", _estimate(quality.perplexity, 2)]
    if dense:
        return [*shown, "", "", ""]
    return [
        *shown,
        _estimate(quality.perplexity_gap, 2, sign=True),
        _estimate(quality.kl, 4),
        _estimate(quality.agreement, 3),
    ]


def _estimate(estimate: Estimate, digits: int, *, sign: bool = False) -> str:
    value = f"{estimate.value:{'+' if sign else ''}.{digits}f}"
    if estimate.standard_error is None:
        return value
    return f"{value} ± {estimate.standard_error:.{digits}f}"
