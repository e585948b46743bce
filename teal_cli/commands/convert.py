"""`teal convert`: a downloaded model in the layout that sparse decoding reads."""

from __future__ import annotations

from typing import Annotated, Literal

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
    QuantizeOption,
    RevisionOption,
    ThreadsOption,
    TokenOption,
)

RoundingOption = Annotated[
    Literal["gptq", "nearest"] | None,
    typer.Option(
        "--rounding",
        help="How int4 weights are found: 'gptq' makes up for the error of each in those that"
        " follow, 'nearest' takes each alone. [default: gptq; nearest for int8]",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Windows of text to round on. [default: 64]"),
]
SeqLenOption = Annotated[
    int | None,
    typer.Option("--seq-len", min=8, help="Tokens in a window. [default: 512]"),
]


def convert(
    model: ModelArgument = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    rounding: RoundingOption = None,
    dataset: DatasetOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Convert again even if it is up to date.")
    ] = False,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Convert a model to teal's layout, downloading it first if need be.

    Prints the folder that holds the result. Does nothing when that is up to date.

    int4 weights are rounded with regard for what they multiply, on the text of --dataset; the
    other options about text, --device too, are for that.
    """
    asked = {"dataset": dataset, "column": column, "samples": samples, "seq_len": seq_len}
    text = {name: value for name, value in asked.items() if value is not None}
    if quantize is None and (rounding or text):
        option = "rounding" if rounding else next(iter(text)).replace("_", "-")
        raise UsageError(f"--{option} goes with --quantize")
    from teal_cli.store import hub, models

    reporter = console.reporter()
    ref = models.resolve(model, revision)
    source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)

    from teal_cli import pipeline
    from teal_cli.model.checkpoint import Checkpoint  # imports torch: not before a typo is found
    from teal_cli.model.convert import convert as convert_model
    from teal_cli.threads import use_threads

    use_threads(threads)

    how = pipeline.rounding_for(
        quantize, rounding, text, device=device, offline=offline, reporter=reporter
    )
    folder = convert_model(source, dtype=dtype, rounding=how, reporter=reporter, force=force)
    models.remember(ref)
    checkpoint = Checkpoint(folder)
    if json:
        console.print_json(
            {
                "model": checkpoint.name,
                "folder": folder,
                "dtype": str(checkpoint.dtype).removeprefix("torch."),
                "quantization": checkpoint.quantization and checkpoint.quantization.name,
                "rounding": checkpoint.rounding,
                "bytes": checkpoint.nbytes,
                "fingerprint": checkpoint.fingerprint,
            }
        )
    else:
        console.print_path(folder)
