"""The options that several commands share, as `Annotated` aliases.

A command writes `model: ModelArgument = None, sparsity: SparsityOption = 0.5`; `-q` and `-v` are
added to every command by `teal_cli.app`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Dtype = Literal["float16", "bfloat16", "float32"]
Quantize = Literal["int8", "int8+head", "int4", "int4+head", "int4-128", "int4-128+head"]


def check_sparsity(value: float | None) -> float | None:
    """Option callback: the value itself, if it is in [0, 1)."""
    if value is not None and not 0.0 <= value < 1.0:
        raise typer.BadParameter(f"{value:g} is not in [0, 1).")
    return value


def parse_sparsities(text: str) -> tuple[float, ...]:
    """The sparsities in a comma-separated list such as "0.25,0.4,0.5", without repeats.

    Raises:
        typer.BadParameter: an entry is not a number in [0, 1), or there is none.
    """
    values: dict[float, None] = {}
    for entry in text.split(","):
        try:
            value = float(entry)
        except ValueError:
            raise typer.BadParameter(f"{entry.strip()!r} is not a number.") from None
        check_sparsity(value)
        values[value] = None
    return tuple(values)


def _check_sparsities(text: str) -> str:
    parse_sparsities(text)
    return text


def complete_stored(incomplete: str) -> list[str]:
    """The names of stored models that begin so, for the shell."""
    from teal_cli.model import inventory

    return [name for name in inventory.names() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """The models that begin so: stored ones, 'demo', and checkpoints and .gguf files; paths too."""
    import glob
    import os

    begun = glob.escape(os.path.expanduser(incomplete))
    files = [os.path.dirname(path) for path in glob.glob(f"{begun}*/config.json")]
    files += glob.glob(f"{begun}*.gguf")
    if "/" in incomplete:
        files += glob.glob(f"{begun}*/")
    known = [name for name in ("demo",) if name.startswith(incomplete)]
    return [*known, *complete_stored(incomplete), *sorted(set(files))]


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id (org/name), a local folder, a .gguf file or 'demo'. "
        "Left out: the last model used, at first the demo model.",
        autocompletion=complete_model,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit on the Hub. [default: main]"),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        help="Access token for the Hub; in HF_TOKEN it stays out of the shell's history."
        " [default: HF_TOKEN or the one stored by 'hf auth login']",
    ),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what is on this machine; ask no server.")
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Data type of the weights. [default: the checkpoint's own]"),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        help="Store the projections as int8, or as int4 in groups of 64 or, 'int4-128', of 128"
        " weights; '+head' stores the lm_head as int8 too. [default: not quantized]",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda' or 'cuda:N'.")]
SparsityOption = Annotated[
    float,
    typer.Option(
        "--sparsity",
        "-s",
        help="Share of the projections' inputs to skip, from 0 (exact) to below 1.",
        callback=check_sparsity,
    ),
]
# The value is the text as typed, checked; `parse_sparsities` turns it into numbers.
SparsitiesOption = Annotated[
    str,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="LIST",
        help="Sparsities to compare, separated by commas.",
        callback=_check_sparsities,
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How the profile shares the sparsity out over layers and projections."
        " [default: the profile's best]",
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On CUDA, the same sums in every run, to the last bit, at some cost in speed. On a"
        " CPU they always are, for a given number of threads.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="'wikitext-2', 'pydoc', a Hub data set, or a .txt, .jsonl or .parquet file."
        " [default: wikitext-2, or pydoc when the Hub cannot be reached]",
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option("--column", help="The data's text column. [default: text]"),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show results and errors, nothing else.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the libraries' warnings and log lines too.")
]
