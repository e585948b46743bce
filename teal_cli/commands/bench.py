"""`teal bench`: how fast a model decodes, dense and sparse."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    SeedOption,
    TokenOption,
    parse_sparsities,
)

if TYPE_CHECKING:
    from teal_cli.benchmark.bandwidth import Bandwidth
    from teal_cli.benchmark.bench import Settings
    from teal_cli.benchmark.result import CardRow
    from teal_cli.benchmark.subject import Subject
    from teal_cli.model.decoder import Decoder
    from teal_cli.progress import Reporter


class BaselineName(str, Enum):
    """What else can be measured (Typer takes no list of literals)."""

    transformers = "transformers"
    compile = "compile"


RandomWeightsOption = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Random weights at MODEL's real shape, without a download: llama-2-7b, llama-3-8b,"
        " mistral-7b, tinyllama-1.1b and more, or a folder with a config.json.",
    ),
]
TokensOption = Annotated[int, typer.Option("--tokens", "-n", min=2, help="Tokens to decode.")]
PromptTokensOption = Annotated[
    int, typer.Option("--prompt-tokens", min=1, help="Tokens in the prompt.")
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", min=1, help="Runs of each row, taken in turns.")
]
BaselineOption = Annotated[
    list[BaselineName] | None,
    typer.Option(
        "--baseline",
        help="Measure this too: transformers' generate at its fastest, or the same decoder in"
        " plain torch under torch.compile. Can be given twice.",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the result to a .json, .csv or .md file."),
]
BenchSparsitiesOption = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="LIST",
        help="Sparsities to compare, separated by commas, as 0.4 or 40%."
        " [default: 0.25,0.4,0.5, with --kernels 0.65 too]",
    ),
]
KernelsOption = Annotated[
    bool,
    typer.Option(
        "--kernels",
        help="Measure the matrices one by one instead, beside torch's F.linear.",
    ),
]
TuneOption = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Search the fastest launches of the GPU's kernels for MODEL's shapes instead, and"
        " store them for this device, where chat and bench find them. Takes minutes.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Also draw the result, as a .png, .pdf or .svg file."),
]


def bench(
    model: ModelArgument = None,
    sparsity: BenchSparsitiesOption = None,
    random_weights: RandomWeightsOption = False,
    tokens: TokensOption = 100,
    prompt_tokens: PromptTokensOption = 32,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = None,
    kernels: KernelsOption = False,
    tune: TuneOption = False,
    method: MethodOption = None,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Measure decoding speed, dense and sparse, against what the memory allows.

    The same prompt is answered by every row in turns, and the memory's bandwidth is measured
    beside them: it sets the ceiling. Speed-ups are medians over pairs of runs.
    """
    if sparsity is None:
        sparsity = "0.25,0.4,0.5,0.65" if kernels or tune else "0.25,0.4,0.5"
    sparsities = parse_sparsities(sparsity)
    if (kernels or tune) and (baseline or plot):
        raise UsageError("--kernels and --tune take neither --baseline nor --plot")
    reporter = console.reporter()

    import torch

    from teal_cli import exports, pipeline
    from teal_cli.benchmark import bench, subject
    from teal_cli.benchmark import tune as tuning
    from teal_cli.inference.device import pick_device
    from teal_cli.model.quantization import quantization
    from teal_cli.store import models

    exports.check_table(output)
    exports.check_figure(plot)
    target_device = pick_device(device)
    baselines = tuple(dict.fromkeys(name.value for name in baseline or ()))
    settings = bench.Settings(
        sparsities, tokens, prompt_tokens, repeats, baselines, seed, deterministic
    )
    if tune:
        tuning.require_tunable(target_device)
    kind, floats = quantization(quantize), getattr(torch, dtype or "float16")
    if random_weights and (kernels or tune):
        decoder, description = subject.random_model(
            model, floats, settings, target_device, reporter, kind
        )
        _run_kernels(decoder, description, settings, tune, output, json, reporter)
        return
    if random_weights:
        tested = subject.random_subject(model, floats, settings, target_device, reporter, kind)
    else:
        checkpoint = pipeline.ensure_checkpoint(
            models.resolve(model, revision),
            dtype=dtype,
            quantize=quantize,
            thresholds=None if kernels or tune else "best",
            device=device,
            token=token,
            offline=offline,
            reporter=reporter,
        )
        if kernels or tune:
            decoder = checkpoint.load(target_device)
            description = {"name": checkpoint.name, "weights": "its own"}
            description |= subject.weights_type(decoder)
            _run_kernels(decoder, description, settings, tune, output, json, reporter)
            return
        profile = pipeline.ensure_profile(
            checkpoint, device=device, offline=offline, reporter=reporter
        )
        tested = subject.model_subject(checkpoint, profile, method, settings, target_device)
    _measure(tested, settings, output, plot, json, reporter)


def _measure(
    tested: Subject,
    settings: Settings,
    output: Path | None,
    plot: Path | None,
    json: bool,
    reporter: Reporter,
) -> None:
    """Measure decoding; print, write and draw what was found."""
    from teal_cli.benchmark import bandwidth, bench, report, result
    from teal_cli.environment import environment
    from teal_cli.store.artifacts import atomic_write

    decoder = tested.decoder
    measured, rows, notes = bench.measure(
        decoder,
        tested.prompt,
        settings,
        tested.setting_for,
        lambda: bandwidth.measure_bandwidth(decoder.device),
        reporter,
    )
    card = result.cost_card(
        decoder.config,
        measured,
        itemsize=decoder.dtype.itemsize,
        quantization=decoder.weights.quantization,
        position=settings.mean_position,
        sparsities=settings.sparsities,
    )
    found = result.BenchResult(
        model=tested.description | {"shape": asdict(decoder.config)},
        environment=environment(decoder.device),
        settings=asdict(settings),
        bandwidth=measured,
        card=card,
        rows=rows,
        notes=notes,
    )
    if json:
        console.print_json(found)
    else:
        _print_card(card, measured)
        model, _, measured_how = report.heading(found, "± half of p20–p80").partition(": ")
        console.print_table(*report.short_table(rows), title=(f"{model}:", measured_how))
        for note in (*report.backends(rows), *notes):
            console.print_line(note)
    if output is not None:
        atomic_write(output, report.render(found, output.suffix.lower()).encode())
    if plot is not None:
        from teal_cli.benchmark.plot import draw

        atomic_write(plot, draw(found, plot.suffix.lower()))
        reporter.note(f"plot: {plot}")


def _run_kernels(
    decoder: Decoder,
    description: dict[str, Any],
    settings: Settings,
    tune: bool,
    output: Path | None,
    json: bool,
    reporter: Reporter,
) -> None:
    """Tune, or measure the matrices one by one; print and write what was found."""
    from teal_cli.benchmark import bandwidth, kernels, report
    from teal_cli.benchmark import tune as tuning
    from teal_cli.environment import environment
    from teal_cli.inference import launches
    from teal_cli.store.artifacts import atomic_write

    machine = environment(decoder.device)
    model = description | {"shape": asdict(decoder.config)}
    found: kernels.KernelResult | tuning.TuneResult
    if tune:
        rows = tuning.tune(decoder, settings.sparsities, reporter)
        notes = (f"Stored in {launches.path(decoder)}.",)
        found = tuning.TuneResult(model, machine, asdict(settings), rows, notes)
        table = report.tune_table(rows)
    else:
        measured, timed, remarks = kernels.measure_kernels(
            decoder,
            settings.sparsities,
            settings.repeats,
            lambda: bandwidth.measure_bandwidth(decoder.device),
            reporter,
        )
        found = kernels.KernelResult(model, machine, asdict(settings), measured, timed, remarks)
        table = report.kernel_table(timed)
    if json:
        console.print_json(found)
    else:
        console.print_table(*table, title=[report.kernel_heading(found)])
        for note in found.notes:
            console.print_line(note)
    if output is not None:
        atomic_write(output, report.render_kernels(found, output.suffix.lower()).encode())


def _print_card(card: tuple[CardRow, ...], measured: Bandwidth) -> None:
    from teal_cli.benchmark.report import card_table

    title = f"Memory: {measured.bytes_per_s / 1e9:.1f} GB/s ({measured.how})"
    console.print_table(*card_table(card), title=[title])
    print()
