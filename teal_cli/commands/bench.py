"""`teal bench`: how fast a model decodes, dense and sparse."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    DeterministicOption,
    DeviceOption,
    DraftOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    NoRecoverOption,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    SeedOption,
    ThreadsOption,
    TokenOption,
    parse_sparsities,
)

if TYPE_CHECKING:
    from teal_cli.sparsity.setting import Setting


class BaselineName(str, Enum):
    """What else can be measured (Typer takes no list of literals)."""

    transformers = "transformers"
    compile = "compile"
    llama_cpp = "llama.cpp"


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
CopyOption = Annotated[
    bool,
    typer.Option(
        "--copy",
        help="In the place of that prompt, ask for the copy of a page with one change: what"
        " --draft lookup is for.",
    ),
]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", min=1, help="Runs of each row, taken in turns.")
]
BaselineOption = Annotated[
    list[BaselineName] | None,
    typer.Option(
        "--baseline",
        help="Measure this too: transformers' generate at its fastest, the same decoder in plain"
        " torch under torch.compile, or llama.cpp by its llama-bench, from the PATH or"
        " TEAL_LLAMA_BENCH. Can be given several times.",
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
        " [default: 0.25,0.4,0.5, with --kernels 0.65 too, with --draft 0.5]",
    ),
]
AcceptanceOption = Annotated[
    float | None,
    typer.Option(
        "--acceptance",
        min=0.0,
        max=1.0,
        help="With --draft: count guesses as right with this probability, to measure speed where"
        " weights are random.",
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
    copy: CopyOption = False,
    repeats: RepeatsOption = 5,
    baseline: BaselineOption = None,
    draft: DraftOption = None,
    acceptance: AcceptanceOption = None,
    kernels: KernelsOption = False,
    tune: TuneOption = False,
    method: MethodOption = None,
    no_recover: NoRecoverOption = False,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
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
    usual = "0.25,0.4,0.5,0.65" if kernels or tune else "0.25,0.4,0.5" if draft is None else "0.5"
    sparsities = parse_sparsities(sparsity or usual)
    if (kernels or tune) and (baseline or plot or draft):
        raise UsageError("--kernels and --tune take neither --baseline nor --plot nor --draft")
    if acceptance is not None and draft is None:
        raise UsageError("--acceptance is of guesses: it needs --draft")
    if copy and random_weights:
        raise UsageError(
            "random weights copy nothing", hint="Leave --copy out, or name a model with weights."
        )
    reporter = console.reporter()

    import torch

    from teal_cli import pipeline
    from teal_cli.benchmark import bench, run, subject
    from teal_cli.benchmark.plot import draw
    from teal_cli.benchmark.report import BenchReport, KernelReport
    from teal_cli.benchmark.tune import require_tunable
    from teal_cli.commands.results import deliver, deliver_figure
    from teal_cli.drafts import measured
    from teal_cli.drafts.names import Wanted
    from teal_cli.drafts.ready import Draft, prepare
    from teal_cli.inference.device import pick_device
    from teal_cli.model.quantization import quantization
    from teal_cli.report import files
    from teal_cli.store import hub, models
    from teal_cli.threads import use_threads

    files.check_table(output)
    files.check_figure(plot)
    target_device = pick_device(device)
    use_threads(threads)
    baselines = tuple(dict.fromkeys(name.value for name in baseline or ()))
    settings = bench.Settings(
        sparsities,
        tokens,
        prompt_tokens,
        repeats,
        baselines,
        seed,
        deterministic,
        draft,
        acceptance,
        copy,
    )
    highest = max(sparsities)
    wanted = None if draft is None else Wanted.parse(draft, highest if sparsity else None)
    if tune:
        require_tunable(target_device)
    kind, floats = quantization(quantize), getattr(torch, dtype or "float16")
    one_by_one = run.tuning if tune else run.matrices
    if random_weights and (kernels or tune):
        decoder, description = subject.random_model(
            model, floats, settings, target_device, reporter, kind
        )
        matrices = one_by_one(decoder, description, settings, reporter)
        deliver(KernelReport(matrices), output, json=json)
        return
    if random_weights:
        if wanted is not None:
            measured.check_random(wanted, model, settings)
        tested = subject.random_subject(model, floats, settings, target_device, reporter, kind)
        if wanted is not None:
            tested = measured.on_random(wanted, tested, settings, reporter)
    else:
        ref = models.resolve(model, revision)
        if wanted is not None:
            wanted = wanted.guessing_for(ref)
        where: Any = {"device": device, "offline": offline, "reporter": reporter}
        checkpoint = pipeline.ensure_checkpoint(
            ref,
            dtype=dtype,
            quantize=quantize,
            thresholds=None if kernels or tune or wanted else "best",
            token=token,
            **where,
        )
        if kernels or tune:
            decoder = checkpoint.load(target_device)
            description = {"name": checkpoint.name, "weights": "its own"}
            description |= subject.weights_type(decoder)
            matrices = one_by_one(decoder, description, settings, reporter)
            deliver(KernelReport(matrices), output, json=json)
            return
        prompt = subject.text_prompt(checkpoint.tokenizer(), settings)
        settings = replace(settings, prompt_tokens=len(prompt))
        settings.check(checkpoint.config)
        profile, guesser = None, None
        made: dict[float, Setting] = {}
        if wanted is None:
            profile = pipeline.ensure_profile(checkpoint, **where)
            made = {
                value: profile.setting(value, method, recover=not no_recover)
                for value in sparsities
            }
        else:
            guesser = prepare(
                wanted, ref, checkpoint, highest, context=settings.length, on=target_device,
                quick=False, token=token, **where,
            )  # fmt: skip
        gguf = hub.gguf_of(ref) if BaselineName.llama_cpp.value in baselines else None
        tested = subject.model_subject(checkpoint, profile, made, prompt, target_device, gguf)
        if guesser is not None:
            setting = partial(Draft.setting, method=method, recover=not no_recover)
            tested = measured.on_model(guesser, tested, settings, setting, reporter)
    found = run.decoding(tested, settings, reporter)
    deliver(BenchReport(found), output, json=json)
    deliver_figure(draw, found, plot)
