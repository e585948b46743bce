"""`teal export`: a model as an ordinary Hugging Face folder, thresholds in its config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teal_cli import console
from teal_cli.options import (
    DeviceOption,
    DtypeOption,
    MethodOption,
    ModelArgument,
    NoRecoverOption,
    OfflineOption,
    RevisionOption,
    SparsityOption,
    TokenOption,
)

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder to write; a new or an empty one.")
]
MaxSequencesOption = Annotated[
    int,
    typer.Option(
        "--max-sequences",
        min=1,
        max=64,
        help="With how many sequences a step of vLLM still decodes sparsely; more decode dense.",
    ),
]


def export(
    model: ModelArgument,
    folder: FolderArgument,
    sparsity: SparsityOption = None,
    max_sequences: MaxSequencesOption = 1,
    method: MethodOption = None,
    no_recover: NoRecoverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
) -> None:
    """Export a model for vLLM: safetensors, tokenizer, and thresholds in its config.

    Needs a profile (`teal calibrate`), but for --sparsity 0. Prints the folder. vLLM with teal-cli
    beside it serves it with `vllm serve DIR`; transformers reads it as the dense model that it is.
    """
    from teal_cli import pipeline
    from teal_cli.export import check_folder
    from teal_cli.export import export as write
    from teal_cli.inference.defaults import chat_defaults
    from teal_cli.sparsity import stored
    from teal_cli.sparsity.setting import DENSE
    from teal_cli.store import models

    check_folder(folder)  # told before a model is fetched
    reporter = console.reporter()
    checkpoint = pipeline.ensure_checkpoint(
        models.resolve(model, revision),
        dtype=dtype,
        device=device,
        token=token,
        offline=offline,
        reporter=reporter,
    )
    target = chat_defaults(checkpoint.config).sparsity if sparsity is None else sparsity
    setting, profile = DENSE, None
    if target > 0:
        found = stored.profile_of(checkpoint)
        if found is None:
            raise stored.no_profile(stored.arguments(checkpoint))
        profile = found[0]
        setting = profile.setting(target, method, recover=not no_recover)
    write(checkpoint, folder, setting, profile, max_sequences=max_sequences, reporter=reporter)
    console.print_path(folder.resolve())
