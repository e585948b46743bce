"""Windows of tokens, cut from a corpus."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.text.corpora import Corpus

# Text is tokenised in blocks whose ends do not depend on how many windows are asked for.
_BLOCK_CHARACTERS = 1 << 16


def windows(
    tokenizer: Any,
    corpus: Corpus,
    *,
    seq_len: int,
    samples: int | None = None,
    seed: int | None = None,
) -> Tensor:
    """Cut a corpus into consecutive windows that do not overlap.

    Args:
        tokenizer: a transformers tokenizer; its BOS token, if it adds one, comes once, first.
        corpus: the text.
        seq_len: tokens in a window.
        samples: how many windows at most; None is all that there are.
        seed: shuffles the corpus's pieces first, so that few windows see much of it; None keeps
            the text in order.

    Returns:
        int64 [windows, seq_len].

    Raises:
        UsageError: samples or seq_len is below 1.
        TealError: the text is shorter than one window.
    """
    if seq_len < 1 or (samples is not None and samples < 1):
        raise UsageError("windows need at least one token, and at least one of them")
    pieces = list(corpus.pieces)
    if seed is not None:
        random.Random(seed).shuffle(pieces)
    wanted = None if samples is None else samples * seq_len
    tokens: list[int] = []
    for number, block in enumerate(_blocks(pieces)):
        tokens += tokenizer(block, add_special_tokens=number == 0, verbose=False)["input_ids"]
        if wanted is not None and len(tokens) >= wanted:
            break
    count = min(len(tokens) // seq_len, samples or len(tokens))
    if count == 0:
        raise TealError(
            f"{corpus.name} ({corpus.part}) has {len(tokens)} tokens, "
            f"fewer than one window of {seq_len}",
            hint="Give more text, or ask for shorter windows.",
        )
    return torch.tensor(tokens[: count * seq_len], dtype=torch.int64).view(count, seq_len)


def _blocks(pieces: Sequence[str]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece)
        if size >= _BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)
