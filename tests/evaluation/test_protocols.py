"""What each protocol cuts out of a text, makes sparse and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.evaluation.protocols import protocol, spread
from teal_cli.model.random_weights import SHAPES

LLAMA = SHAPES["llama-2-7b"]


def text(length: int) -> Callable[[int], Tensor]:
    def tokens(seq_len: int) -> Tensor:
        count = length // seq_len
        if count == 0:
            raise TealError("too short")
        return torch.arange(count * seq_len).view(count, seq_len)

    return tokens


def test_standard_scores_all_but_the_first_token_side_by_side() -> None:
    standard = protocol("standard", LLAMA, 1024)
    assert (standard.window, standard.scored, standard.sparse_from) == (1024, 1023, 4)
    windows = standard.cut(text(5000))
    assert windows.shape == (4, 1024)
    assert windows[1, 0] == 1024


def test_standard_is_2048_or_the_models_context() -> None:
    assert protocol("standard", LLAMA).window == 2048
    assert (
        protocol("standard", dataclasses.replace(LLAMA, max_position_embeddings=512)).window == 512
    )


def test_teal_scores_512_after_2048_with_the_last_half_sparse() -> None:
    teal = protocol("teal", LLAMA)
    assert (teal.window, teal.scored, teal.sparse_from) == (2560, 512, 1280)


def test_teal_windows_score_every_token_once() -> None:
    windows = protocol("teal", LLAMA).cut(text(5000))
    scored = windows[:, 2048:].flatten().tolist()
    assert scored == list(range(2048, 2048 + len(scored)))
    assert len(windows) == (5000 - 2048) // 512


@pytest.mark.parametrize(
    ("windows", "samples", "expected"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (5, 8, [0, 1, 2, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (100, 1, [0]),
        (100, 2, [0, 99]),
        (10, 4, [0, 3, 6, 9]),
    ],
)
def test_few_windows_are_spread_over_the_text(
    windows: int, samples: int | None, expected: list[int]
) -> None:
    assert spread(windows, samples) == expected


@pytest.mark.parametrize("samples", range(1, 60))
def test_windows_that_are_spread_are_different_ones(samples: int) -> None:
    chosen = spread(59, samples)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == samples


def test_a_text_shorter_than_a_window_is_an_error() -> None:
    for name in ("standard", "teal"):
        with pytest.raises(TealError, match="too short"):
            protocol(name, LLAMA).cut(text(2000))


@pytest.mark.parametrize("context", [4097, 4, 0, -1])
def test_a_context_that_the_model_has_not_is_refused(context: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        protocol("standard", LLAMA, context)


def test_teal_needs_room_and_takes_no_context() -> None:
    with pytest.raises(UsageError, match="2560"):
        protocol("teal", SHAPES["tinyllama-1.1b"])
    with pytest.raises(UsageError, match="--context"):
        protocol("teal", LLAMA, 1024)
