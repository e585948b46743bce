"""`teal eval`: what sparsity costs in quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    ColumnOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OfflineOption,
    Quantize,
    RevisionOption,
    SparsitiesOption,
    TokenOption,
    parse_sparsities,
)

if TYPE_CHECKING:
    import torch

    from teal_cli.evaluation.comparison import QualityReport, Setting
    from teal_cli.evaluation.protocols import ProtocolName
    from teal_cli.evaluation.tasks import TasksReport
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.model.decoder import Decoder
    from teal_cli.progress import Reporter
    from teal_cli.sparsity.profile import Profile

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
        help="Run tasks of lm-eval instead of measuring perplexity: names such as arc_easy, or"
        " task files (./mine.yaml), separated by commas.",
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
    sparsity: SparsitiesOption = "0.25,0.4,0.5",
    method: MethodsOption = None,
    protocol: ProtocolOption = "standard",
    dataset: DatasetOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = 8,
    context: ContextOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizationsOption = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    output: OutputOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a model's quality, dense and sparse, on text that calibration did not see.

    Perplexity, KL divergence to the dense model in nats a token, and the share of positions
    where both find the same token likeliest, each with its standard error over the windows.
    Every method at every sparsity reads the same windows, so that their differences are paired.

    With --quantize, all that is compared with the dense model without quantization.

    With --tasks, lm-eval's tasks instead. A text that a task scores is sparse where --protocol
    says, its context included; of an answer that is generated, every token after the prompt.
    """
    sparsities = parse_sparsities(sparsity)
    methods = None if method is None else _entries(method, "--method")
    specs = None if tasks is None else _entries(tasks, "--tasks")
    text_only = {"dataset": dataset, "column": column, "plot": plot}
    if specs and (given := [name for name, value in text_only.items() if value is not None]):
        raise UsageError(f"--{given[0]} is for perplexity: leave it out, or --tasks")
    task_only = {"limit": limit, "num-fewshot": num_fewshot}
    if not specs and (given := [name for name, value in task_only.items() if value is not None]):
        raise UsageError(f"--{given[0]} is about tasks: it needs --tasks")
    kinds = _quantizations(quantize)
    if specs and len(kinds) > 1:
        raise UsageError("--tasks runs one model: name one quantization")
    reporter = console.reporter()

    from teal_cli import exports, pipeline
    from teal_cli.evaluation import comparison, report
    from teal_cli.evaluation.tasks import require_lm_eval
    from teal_cli.inference.device import pick_device
    from teal_cli.store import models
    from teal_cli.store.artifacts import atomic_write

    exports.check_table(output)
    exports.check_figure(plot)
    if specs:
        require_lm_eval()
    target_device = pick_device(device)

    def checkpoint(kind: str | None) -> Checkpoint:
        return pipeline.ensure_checkpoint(
            models.resolve(model, revision),
            dtype=dtype,
            quantize=kind,
            device=device,
            token=token,
            offline=offline,
            reporter=reporter,
        )

    subjects = []
    for kind in kinds:
        made = checkpoint(kind)
        profile = pipeline.ensure_profile(made, device=device, offline=offline, reporter=reporter)
        chosen = methods or (profile.default_method,)
        settings = comparison.settings_for(profile, chosen, sparsities)
        if kind and not specs:
            settings = comparison.on_quantized(kind, settings)
        subjects.append(_Subject(made, profile, settings))
    # A task's own dense run is what its sparse ones are compared with.
    reference = subjects[0].checkpoint if specs or kinds[0] is None else checkpoint(None)
    run = _Run(reference, tuple(subjects), target_device, offline, reporter)
    found: report.Report
    if specs:
        found = _on_tasks(run, specs, protocol, context, limit, num_fewshot)
    else:
        found = _on_text(run, dataset, column, samples, protocol, context)
        if plot is not None:
            from teal_cli.evaluation.plot import draw

            atomic_write(plot, draw(found, plot.suffix.lower()))
    if json:
        console.print_json(found.document())
    else:
        for number, (title, (columns, lines)) in enumerate(found.tables()):
            if number:
                print()
            console.print_table(columns, lines, title=title)
    if output is not None:
        atomic_write(output, report.render(found, output.suffix.lower()).encode())


@dataclass(frozen=True, slots=True)
class _Subject:
    """One form of the model, quantized or not."""

    checkpoint: Checkpoint
    profile: Profile
    settings: tuple[Setting, ...]

    def inputs(self) -> dict[str, Any]:
        """What a report says of a quantized form."""
        checkpoint, profile = self.checkpoint, self.profile
        return {
            "quantization": checkpoint.quantization and checkpoint.quantization.name,
            "fingerprint": checkpoint.fingerprint,
            "rounding": checkpoint.rounding,
            "profile": dict(profile.provenance),
        }


@dataclass(frozen=True, slots=True)
class _Run:
    """What is evaluated, and where."""

    checkpoint: Checkpoint  # whose dense model all is compared with
    subjects: tuple[_Subject, ...]
    device: torch.device
    offline: bool
    reporter: Reporter

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(setting for subject in self.subjects for setting in subject.settings)

    @property
    def profile(self) -> Profile:
        return self.subjects[0].profile

    @property
    def learnt_from(self) -> set[str]:
        """Fingerprints of the texts that profiles and rounding have seen."""
        seen = [subject.profile.provenance for subject in self.subjects]
        seen += [subject.checkpoint.rounding for subject in self.subjects]
        return {
            str(entry["dataset_fingerprint"]) for entry in seen if "dataset_fingerprint" in entry
        }

    def decoders(self, dense: Decoder) -> dict[str, Decoder]:
        """The model that each setting is measured on, by label."""
        found: dict[str, Decoder] = {}
        for subject in self.subjects:
            own = subject.checkpoint is self.checkpoint
            decoder = dense if own else subject.checkpoint.load(self.device)
            found |= {setting.label: decoder for setting in subject.settings}
        return found

    def inputs(self) -> dict[str, Any]:
        """What a report needs to say for the run to be repeated."""
        from teal_cli.environment import environment

        return {
            "model": {
                "name": self.checkpoint.name,
                "revision": self.checkpoint.revision,
                "fingerprint": self.checkpoint.fingerprint,
                "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            },
            "profile": {
                "methods": list(dict.fromkeys(setting.method for setting in self.settings)),
                "provenance": dict(self.profile.provenance),
            },
            "quantized": [
                subject.inputs()
                for subject in self.subjects
                if subject.checkpoint.quantization is not None
            ],
            "environment": environment(self.device),
        }


def _on_text(
    run: _Run,
    dataset: str | None,
    column: str | None,
    samples: int,
    protocol: ProtocolName,
    context: int | None,
) -> QualityReport:
    from teal_cli.evaluation import comparison, perplexity, protocols
    from teal_cli.text.corpora import load_corpus
    from teal_cli.text.windows import windows

    plan = protocols.protocol(protocol, run.checkpoint.config, context)
    corpus = load_corpus(
        dataset,
        split_role="evaluation",
        column=column,
        offline=run.offline,
        calibrated_on=run.learnt_from,
        reporter=run.reporter,
    )
    tokenizer = run.checkpoint.tokenizer()
    text = plan.cut(lambda length: windows(tokenizer, corpus, seq_len=length))
    chosen = protocols.spread(len(text), samples or None)
    dense = run.checkpoint.load(run.device)
    result = perplexity.evaluate(
        dense,
        text[chosen],
        [(setting.label, setting.thresholds) for setting in run.settings],
        plan,
        run.reporter,
        decoders=run.decoders(dense),
    )
    read = {
        "name": corpus.name,
        "part": corpus.part,
        "column": column,
        "fingerprint": corpus.fingerprint,
        "windows": len(text),
        "windows_scored": chosen,
    }
    return comparison.QualityReport.of(run.inputs() | {"dataset": read}, run.settings, result)


def _on_tasks(
    run: _Run,
    specs: tuple[str, ...],
    protocol: ProtocolName,
    context: int | None,
    limit: int | None,
    num_fewshot: int | None,
) -> TasksReport:
    from teal_cli.evaluation import harness, protocols, tasks

    room = protocols.task_context(run.checkpoint.config, context)
    subject = harness.Subject(
        run.checkpoint.load(run.device),
        run.checkpoint.tokenizer(),
        run.checkpoint.eos_token_ids,
        protocol,
        room,
    )
    return tasks.run(
        subject,
        specs,
        run.settings,
        run.inputs() | {"protocol": protocol, "context": room},
        limit=limit,
        num_fewshot=num_fewshot,
        offline=run.offline,
        reporter=run.reporter,
    )


def _entries(text: str, option: str) -> tuple[str, ...]:
    """The entries of a comma-separated list, without repeats."""
    found = tuple(dict.fromkeys(entry.strip() for entry in text.split(",") if entry.strip()))
    if not found:
        raise UsageError(f"{option} names nothing")
    return found


def _quantizations(text: str | None) -> tuple[str | None, ...]:
    """The quantizations in a list; None is the model as it is, which comes first."""
    names = ("none",) if text is None else _entries(text, "--quantize")
    for name in names:
        if name not in ("none", *get_args(Quantize)):
            raise UsageError(
                f"there is no quantization {name!r}",
                hint=f"There are: none, {', '.join(get_args(Quantize))}.",
            )
    return tuple(sorted((None if name == "none" else name for name in names), key=bool))
