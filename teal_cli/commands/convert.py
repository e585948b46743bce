"""`teal convert`: a downloaded model in the layout that sparse decoding reads."""

from __future__ import annotations

from typing import Annotated

import typer

from teal_cli import console
from teal_cli.options import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    TokenOption,
)


def convert(
    model: ModelArgument = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
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
    """
    from teal_cli.store import hub, models

    reporter = console.reporter()
    ref = models.resolve(model, revision)
    source = hub.fetch(ref, token=token, offline=offline, reporter=reporter)

    from teal_cli import pipeline
    from teal_cli.model.checkpoint import Checkpoint  # imports torch: not before a typo is found
    from teal_cli.model.convert import convert as convert_model

    rounding = pipeline.rounding_for(quantize, offline=offline)
    folder = convert_model(source, dtype=dtype, rounding=rounding, reporter=reporter, force=force)
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
        print(folder)
