"""Windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teal_cli.errors import TealError, UsageError
from teal_cli.text.corpora import Corpus
from teal_cli.text.windows import windows


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """One token a byte."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def corpus(pieces: int = 30, size: int = 5000) -> Corpus:
    return Corpus("some.txt", tuple(f"{i:05d}" * (size // 5) for i in range(pieces)), "f")


def test_windows_are_the_text_in_order(tokenizer: Any) -> None:
    some = corpus()
    cut = windows(tokenizer, some, seq_len=700)
    assert cut.dtype == torch.int64
    assert cut.shape == (150_000 // 700, 700)
    assert tokenizer.decode(cut.flatten()) == "".join(some.pieces)[: cut.numel()]


def test_fewer_samples_are_a_prefix(tokenizer: Any) -> None:
    some = corpus()
    everything = windows(tokenizer, some, seq_len=700)
    assert torch.equal(windows(tokenizer, some, seq_len=700, samples=5), everything[:5])
    shuffled = windows(tokenizer, some, seq_len=700, seed=1)
    assert torch.equal(windows(tokenizer, some, seq_len=700, samples=120, seed=1), shuffled[:120])


def test_seed_shuffles_pieces_and_repeats(tokenizer: Any) -> None:
    first, again, other = (
        windows(tokenizer, corpus(), seq_len=500, samples=8, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_special_tokens_come_once(tokenizer: Any) -> None:
    calls = []

    def spy(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        calls.append(add_special_tokens)
        return {"input_ids": [0] * add_special_tokens + [1] * len(text)}

    cut = windows(spy, corpus(), seq_len=10)
    assert calls[0] is True
    assert not any(calls[1:])
    assert len(calls) > 1
    assert (cut == 0).sum() == 1


def test_too_short(tokenizer: Any) -> None:
    with pytest.raises(TealError, match="has 50 tokens, fewer than one window of 51"):
        windows(tokenizer, corpus(1, 50), seq_len=51)
    assert windows(tokenizer, corpus(1, 50), seq_len=50, samples=9).shape == (1, 50)


@pytest.mark.parametrize(("seq_len", "samples"), [(0, 1), (8, 0)])
def test_no_window_at_all_is_refused(tokenizer: Any, seq_len: int, samples: int) -> None:
    with pytest.raises(UsageError):
        windows(tokenizer, corpus(), seq_len=seq_len, samples=samples)
