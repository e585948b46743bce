"""`teal eval`: what sparsity costs in quality."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    ColumnOption,
    DatasetOption,
    DeviceOption,
    DraftOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    NoRecoverOption,
    OfflineOption,
    Quantize,
    RevisionOption,
    SparsitiesOption,
    ThreadsOption,
    TokenOption,
    parse_sparsities,
)
from teal_cli.suggestions import did_you_mean, quoted

if TYPE_CHECKING:
    from teal_cli.evaluation.run import Form
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.sparsity.profile import Profile
    from teal_cli.sparsity.setting import Setting

_T = TypeVar("_T")
_SPARSITIES = "0.25,0.4,0.5"
MethodsOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="LIST",
        help="How the profile shares the sparsity out over layers and projections; several are"
        " separated by commas, and compared with the first. [default: the profile's best]",
    ),
]
QuantizationsOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="LIST",
        help="Quantized forms of the model to compare, dense and sparse, with the dense model that"
        " is not quantized, separated by commas: int8, int4, int4-128, each with '+head' or"
        " without; 'none' is the unquantized model's own sparse rows. [default: none]",
    ),
]
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
    int,
    typer.Option(
        "--samples",
        min=0,
        help="Windows to score, evenly spread over the text; 0 is the whole text.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens in a window of the standard protocol, and at most in a task."
        " [default: 2048, or the model's if shorter; in a task the model's]",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="LIST",
        help="Run tasks of lm-eval instead of measuring perplexity: names such as arc_easy, task"
        " files (./mine.yaml), or 'text', four that are made from --dataset and need no network;"
        " separated by commas.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Documents of each task to run. [default: all]"),
]
FewshotOption = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        min=0,
        help="Worked examples before each document of a task. [default: what the task says]",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Also write the result to a .json, .csv or .md file."),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Also draw perplexity and KL against sparsity, as a .png, .pdf or .svg file.",
    ),
]


def evaluate(
    model: ModelArgument = None,
    sparsity: SparsitiesOption = _SPARSITIES,
    method: MethodsOption = None,
    no_recover: NoRecoverOption = False,
    protocol: ProtocolOption = "standard",
    dataset: DatasetOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = 8,
    context: ContextOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    draft: DraftOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizationsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a model's quality, dense and sparse, on text that calibration did not see.

    Perplexity, KL divergence to the dense model in nats a token, total variation (how much of the
    probability lies on other tokens), and the share of positions where both find the same token
    likeliest, each with its standard error over the windows.
    Every method at every sparsity reads the same windows, so that their differences are paired.

    With --quantize, all that is compared with the dense model without quantization.

    With --tasks, lm-eval's tasks instead. A text that a task scores is sparse where --protocol
    says, its context included; of an answer that is generated, every token after the prompt.
    With --draft the tasks are the dense model's alone, and guesses make its answers faster.
    """
    sparsities = parse_sparsities(sparsity)
    methods = None if method is None else _entries(method, "--method")
    specs = None if tasks is None else _tasks(tasks)
    kinds = _quantizations(quantize)
    _check(
        specs,
        kinds,
        text={"dataset": dataset, "column": column},
        text_only={"plot": plot},
        task_only={"limit": limit, "num-fewshot": num_fewshot, "draft": draft},
    )
    reporter = console.reporter()

    from teal_cli import pipeline
    from teal_cli.commands.results import deliver, deliver_figure
    from teal_cli.drafts.names import Wanted
    from teal_cli.drafts.ready import prepare
    from teal_cli.evaluation.plot import draw
    from teal_cli.evaluation.run import Form, Run
    from teal_cli.evaluation.task_files import check_specs
    from teal_cli.evaluation.tasks import require_lm_eval
    from teal_cli.inference.device import pick_device
    from teal_cli.report import files
    from teal_cli.store import models
    from teal_cli.threads import use_threads

    files.check_table(output)
    files.check_figure(plot)
    if specs:
        require_lm_eval()
        check_specs(specs)
    target_device = pick_device(device)
    use_threads(threads)
    where: dict[str, Any] = {"device": device, "offline": offline, "reporter": reporter}
    ref = models.resolve(model, revision)
    checkpoint = partial(pipeline.ensure_checkpoint, ref, dtype=dtype, token=token)
    if specs and draft is not None:
        target = None if sparsity == _SPARSITIES else _one(sparsities, "sparsity")
        name = None if methods is None else _one(methods, "method")
        wanted = Wanted.parse(draft, target).guessing_for(ref)
        dense = checkpoint(quantize=kinds[0], **where)
        room = context or dense.config.context_length
        guesser = prepare(
            wanted, ref, dense, target,
            context=room, on=target_device, quick=False, token=token, **where,
        )  # fmt: skip
        setting = guesser.setting(name, recover=not no_recover)
        attach = partial(guesser.attach, setting=setting, reporter=reporter)
        run = Run(dense, (Form(dense, None, ()),), target_device, offline, reporter)
        told = wanted.name, attach
        tasks_report = run.on_tasks(
            specs, protocol, context, limit, num_fewshot, told, dataset=dataset, column=column
        )
        deliver(tasks_report, output, json=json)
        return
    forms = []
    for kind in kinds:
        made = checkpoint(quantize=kind, thresholds="best", **where)
        profile = pipeline.ensure_profile(made, **where)
        settings = _settings(profile, methods, sparsities, recover=not no_recover)
        forms.append(_form(made, profile, settings, tasks=specs is not None))
    # A task's own dense run is what its sparse ones are compared with.
    reference = forms[0].checkpoint if specs or kinds[0] is None else checkpoint(**where)
    run = Run(reference, tuple(forms), target_device, offline, reporter)
    if specs:
        tasks_report = run.on_tasks(
            specs, protocol, context, limit, num_fewshot, dataset=dataset, column=column
        )
        deliver(tasks_report, output, json=json)
        return
    found = run.on_text(dataset, column, samples, protocol, context)
    deliver(found, output, json=json)
    deliver_figure(draw, found, plot)


def _check(
    specs: tuple[str, ...] | None,
    kinds: tuple[str | None, ...],
    *,
    text: dict[str, object],
    text_only: dict[str, object],
    task_only: dict[str, object],
) -> None:
    """Refuse options that contradict each other."""
    from teal_cli.evaluation import text_tasks

    if specs and not any(map(text_tasks.is_made, specs)):
        text_only = text | text_only
    for name, value in text_only.items():
        if specs and value is not None:
            raise UsageError(f"--{name} is for perplexity: leave it out, or --tasks")
    for name, value in task_only.items():
        if not specs and value is not None:
            raise UsageError(f"--{name} is about tasks: it needs --tasks")
    if specs and len(kinds) > 1:
        raise UsageError("--tasks runs one model: name one quantization")


def _one(given: tuple[_T, ...], what: str) -> _T:
    """The only one of a list, as guesses have it."""
    if len(given) > 1:
        raise UsageError(f"--draft guesses at one {what}: name one")
    return given[0]


def _form(
    checkpoint: Checkpoint,
    profile: Profile,
    settings: tuple[Setting, ...],
    *,
    tasks: bool,
) -> Form:
    """A form of the model with what is measured on it; tasks run dense by themselves."""
    from teal_cli.evaluation import comparison
    from teal_cli.evaluation.run import Form

    if checkpoint.quantization is not None and not tasks:
        settings = comparison.on_quantized(checkpoint.quantization.name, settings)
    return Form(checkpoint, profile, settings)


def _settings(
    profile: Profile,
    methods: tuple[str, ...] | None,
    sparsities: tuple[float, ...],
    *,
    recover: bool,
) -> tuple[Setting, ...]:
    """What is measured; methods at one sparsity stand side by side."""
    chosen = methods or (profile.default_method,)
    return tuple(
        profile.setting(value, name, recover=recover) for value in sparsities for name in chosen
    )


def _entries(text: str, option: str) -> tuple[str, ...]:
    """The entries of a comma-separated list, without repeats."""
    found = tuple(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not found:
        raise UsageError(f"{option} names nothing")
    return found


def _tasks(text: str) -> tuple[str, ...]:
    """The tasks that are named, `text` spelt out."""
    from teal_cli.evaluation import text_tasks

    found: list[str] = []
    for entry in _entries(text, "--tasks"):
        found += text_tasks.TASKS if entry == text_tasks.ALL else [entry]
    return tuple(dict.fromkeys(found))


def _quantizations(text: str | None) -> tuple[str | None, ...]:
    """The quantizations in a list; None is the model as it is, which comes first."""
    names = ("none",) if text is None else _entries(text, "--quantize")
    for name in names:
        if name not in ("none", *get_args(Quantize)):
            raise UsageError(
                f"there is no quantization {quoted(name)}",
                hint=f"{did_you_mean(name, get_args(Quantize))}"
                f"There are: none, {', '.join(get_args(Quantize))}.",
            )
    return tuple(sorted((None if name == "none" else name for name in names), key=bool))
