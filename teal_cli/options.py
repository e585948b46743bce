"""The options that several commands share, as `Annotated` aliases.

A command writes `model: ModelArgument = None, sparsity: SparsityOption = 0.5`; `-q` and `-v` are
added to every command by `teal_cli.app`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from teal_cli.errors import UsageError
from teal_cli.suggestions import quoted
from teal_cli.threads import usable

Dtype = Literal["float16", "bfloat16", "float32"]
# Room for a conversation where --context does not say: 1 GB of cache at Llama-3-8B's shape.
DEFAULT_CONTEXT = 8192
Quantize = Literal["int8", "int8+head", "int4", "int4+head", "int4-128", "int4-128+head"]


def parse_sparsity(text: str) -> float:
    """The share in "0.4" or "40%".

    Raises:
        UsageError: it is no number, or not in [0, 1).
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0.0 <= value < 1.0:
        raise UsageError(
            f"sparsity is a share from 0 to below 1, not {quoted(text.strip())}",
            hint=_as_share(text, value),
        )
    return value


def _as_share(text: str, value: float) -> str:
    """How to write a share: the one that may have been meant, or an example."""
    if "," in text:
        return "A decimal number has a point, as in 0.4."
    if 1 < value < 100 and "%" not in text:
        return f"{value:g} % is written {value / 100:g} or {value:g}%."
    return "0.4 and 40% both skip 40 % of the inputs."


def parse_sparsities(text: str) -> tuple[float, ...]:
    """The sparsities in a comma-separated list such as "0.25,40%,0.5", without repeats.

    Raises:
        UsageError: an entry is not a share in [0, 1), or there is none.
    """
    return tuple(dict.fromkeys(parse_sparsity(entry) for entry in text.split(",")))


def check_sparsities(text: str | None) -> str | None:
    if text is not None:
        parse_sparsities(text)
    return text


def _check_threads(threads: int | None) -> int | None:
    cores = usable()
    if threads is not None and threads > cores:
        raise UsageError(
            f"{threads} threads are more than the {cores} core{'' if cores == 1 else 's'} that this"
            " process may use",
            hint="Threads wait for each other, so that each needs a core of its own: choose"
            " --threads, or TEAL_THREADS, up to that.",
        )
    return threads


def complete_stored(incomplete: str) -> list[str]:
    """The names of stored models that begin so, for the shell."""
    from teal_cli.model import inventory

    return [name for name in inventory.names() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """The models that begin so: short names, stored ones, checkpoints, .gguf files, paths."""
    import glob
    import os

    from teal_cli.store import models

    begun = glob.escape(os.path.expanduser(incomplete))
    files = [os.path.dirname(path) for path in glob.glob(f"{begun}*/config.json")]
    files += glob.glob(f"{begun}*.gguf")
    if "/" in incomplete:
        files += glob.glob(f"{begun}*/")
    # Not all of them at once: they would bury what is here.
    names = models.names() if incomplete else ["demo"]
    known = [name for name in names if name.startswith(incomplete)]
    return [*known, *complete_stored(incomplete), *sorted(set(files))]


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id (org/name), a short name such as llama3, a local folder, a .gguf file or"
        " 'demo'. Left out: the last model used, at first the demo model.",
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
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="X",
        help="Share of the projections' inputs to skip, from 0 (exact) to below 1; 40% is 0.4."
        " [default: 0.4; 0.25 below a billion weights]",
        parser=parse_sparsity,
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Name of the chat template, for a model that has several."
        " [default: its default, or the only one for talking]",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens that the conversation may hold."
        f" [default: the model's, at most {DEFAULT_CONTEXT}]",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        envvar="TEAL_THREADS",
        callback=_check_threads,
        help="Threads that compute on a CPU. [default: OMP_NUM_THREADS, else one a core, of those"
        " that affinity and a container's quota leave]",
    ),
]
# The value is the text as typed, checked; `parse_sparsities` turns it into numbers.
SparsitiesOption = Annotated[
    str,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="LIST",
        help="Sparsities to compare, separated by commas, as 0.4 or 40%.",
        callback=check_sparsities,
    ),
]
NoRecoverOption = Annotated[
    bool,
    typer.Option(
        "--no-recover",
        help="Leave out the vectors of `teal calibrate --recover`, which are used where the"
        " profile has them.",
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
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="LIST",
        help="Let the dense model check tokens that something cheaper guesses, which gives its own"
        " answer, faster: 'lookup' guesses what the text said before, 'self' is the model itself,"
        " sparse, or name a smaller one; self:int8 is quantized. lookup,self tries both."
        " --sparsity is the guesses' then.",
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
