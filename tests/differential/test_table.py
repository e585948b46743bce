"""Situations × families: teal against transformers, a row for each thing that checkpoints do.

A new situation is a row in one of the modules of `rows`; CONTRIBUTING.md says how.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import transformers
from benchmark.commands import runner
from differential.rows import chat, context, gguf, quantized, refused, settings, text, weights
from differential.situations import Situation
from packaging.version import Version

TABLE = [
    pytest.param(row, family, id=f"{module.__name__.rpartition('.')[2]}: {row.name} [{family}]")
    for module in (text, weights, quantized, context, chat, settings, refused, gguf)
    for row in module.ROWS
    for family in row.families
]


@pytest.fixture(autouse=True)
def _quiet_oracle() -> None:
    """transformers warns of much that the table does on purpose."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.mark.parametrize(("situation", "family"), TABLE)
def test_teal_equals_its_oracle(
    situation: Situation,
    family: str,
    tmp_path: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needed = situation.transformers
    if needed is not None and Version(transformers.__version__) < Version(needed):
        pytest.skip(f"transformers before {needed} knows too little for it")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    situation.same(situation.make(tmp_path, family), runner("chat", monkeypatch, capsys))
