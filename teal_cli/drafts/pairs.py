"""Whether one model can guess tokens for another."""

from __future__ import annotations

from typing import Any

from teal_cli.benchmark.cost import weight_bytes
from teal_cli.errors import UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.suggestions import quoted


def check_sizes(own: ModelConfig, other: ModelConfig, name: str, other_name: str) -> None:
    """Make sure that a model that guesses is not larger than the one that checks.

    Raises:
        UsageError: it is.
    """
    ours, theirs = (weight_bytes(config, 1) for config in (own, other))
    if ours > theirs:
        raise UsageError(
            f"{name} has {ours / 1e6:,.1f} million weights, more than the {theirs / 1e6:,.1f} of"
            f" {other_name}: what guesses has to be the smaller one"
        )


def check_vocabularies(own: Any, other: Any, name: str, other_name: str) -> None:
    """Make sure that two tokenizers number the same tokens alike.

    Raises:
        UsageError: they do not.
    """
    mine, others = _tokens(own), _tokens(other)
    if mine == others:
        return
    differing = sorted(mine.items() ^ others.items(), key=lambda entry: entry[::-1])
    if len(mine) != len(others):
        why = f"it has {len(mine)} tokens, not {len(others)}"
    else:
        count = sum(others.get(token) != i for token, i in mine.items())
        why = f"{count} of {len(mine)} tokens differ"
    raise UsageError(
        f"{name} cannot guess for {other_name}: their vocabularies are not the same"
        f" ({why}, as {quoted(differing[0][0])})",
        hint="Choose a smaller model of the same family, or --draft lookup.",
    )


def _tokens(tokenizer: Any) -> dict[str, int]:
    """Its tokens by text, without those that fill up a GGUF file's to the embedding's rows."""
    return {token: i for token, i in tokenizer.get_vocab().items() if token != f"[PAD{i}]"}
