"""A model that does not fit: the same profile, one layer on the device at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sparsity.interrupts import QUIET, StopsAfter

from teal_cli.model.decoder import Decoder
from teal_cli.sparsity import streaming
from teal_cli.sparsity.calibrate import calibrate

METHODS = ("sensitivity", "uniform")


def test_streamed_layers_give_the_same_profile(
    decoder: Decoder, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(decoder, tokens, model="tiny", methods=METHODS, reporter=QUIET)
    moves: list[Any] = []
    move = streaming._moved
    monkeypatch.setattr(
        streaming, "_moved", lambda layer, device: moves.append(layer) or move(layer, device)
    )
    streamed = streaming.streamed(decoder, torch.device("cpu"))
    found = calibrate(streamed, tokens, model="tiny", methods=METHODS, reporter=QUIET)
    for target in (0.3, 0.6):
        assert torch.equal(found.thresholds(target), expected.thresholds(target))
    # Histograms, forward, backward, dense again and four targets of two methods; backward begins
    # with the layer that forward ended with, and ends with the one that the next pass begins with.
    assert len(moves) == 4 * (1 + 2 + 1 + 2 * 4) - 2


def test_what_does_not_fit_is_streamed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    monkeypatch.setattr(streaming, "streamed", lambda decoder, device: "streamed")
    asked: list[Any] = []

    def checkpoint(nbytes: int) -> Any:
        return SimpleNamespace(nbytes=nbytes, load=lambda *device: asked.append(device))

    device, reporter = torch.device("cuda", 0), StopsAfter(None)
    assert streaming.load(checkpoint(140 << 30), device, reporter) == "streamed"
    assert "one layer at a time" in reporter.notes[0]
    assert streaming.load(checkpoint(1 << 30), device, reporter) is None
    assert asked == [(), (device,)]
