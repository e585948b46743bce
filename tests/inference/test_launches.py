"""Stored launches: what is read back, and what is refused with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import hf_model, our_decoder
from reporters import Notes

from teal_cli.inference import launches
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Silent

pytest.importorskip("triton")

DENSE, SPARSE = 0.0, 0.2


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Decoder:
    monkeypatch.setenv("TEAL_HOME", str(tmp_path))
    return our_decoder(hf_model("llama"), torch.float16)


def entry(decoder: Decoder, name: str = "qkv", **changes: Any) -> dict[str, Any]:
    launch = getattr(launches.table_launches(decoder)[SPARSE], name)
    return launch._replace(**changes)._asdict()


def test_nothing_stored_leaves_the_table(decoder: Decoder) -> None:
    notes = Notes()
    assert launches.stored_launches(decoder, notes) is None
    assert notes.notes == []


def test_what_is_stored_takes_its_own_place_only(decoder: Decoder) -> None:
    table = launches.table_launches(decoder)
    key = launches.matrix_key(decoder, "qkv", SPARSE)
    launches.write(decoder, {key: entry(decoder, num_warps=8, registers=96)})
    found = launches.stored_launches(decoder, Silent())
    assert found is not None
    assert found[DENSE] == table[DENSE]
    assert found[SPARSE].qkv == table[SPARSE].qkv._replace(num_warps=8, registers=96)
    assert found[SPARSE]._replace(qkv=table[SPARSE].qkv) == table[SPARSE]


def test_the_lm_head_has_one_launch_for_both_steps(decoder: Decoder) -> None:
    key = launches.matrix_key(decoder, "logits", DENSE)
    assert key == launches.matrix_key(decoder, "logits", SPARSE)
    launches.write(decoder, {key: entry(decoder, "logits", num_warps=2)})
    found = launches.stored_launches(decoder, Silent())
    assert found is not None
    assert found[DENSE].logits.num_warps == found[SPARSE].logits.num_warps == 2


def test_another_dtype_or_shape_is_left_alone(decoder: Decoder) -> None:
    key = launches.matrix_key(decoder, "qkv", SPARSE)
    launches.write(decoder, {key.replace("float16", "bfloat16"): entry(decoder, num_warps=8)})
    assert launches.stored_launches(decoder, Silent()) is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 0},
        {"made_for": {"kernels": "others", "triton": "3"}},
        {"entries": {"float16 qkv": {"block_k": 16}}},
        {"entries": []},
        {"entries": None},
    ],
    ids=["format", "kernels", "fields", "list", "null"],
)
def test_what_does_not_fit_is_ignored_with_a_note(decoder: Decoder, change: dict[str, Any]) -> None:
    key = launches.matrix_key(decoder, "qkv", SPARSE)
    file = launches.write(decoder, {key: entry(decoder, num_warps=8)})
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    notes = Notes()
    assert launches.stored_launches(decoder, notes) is None
    assert len(notes.notes) == 1
    assert "teal bench --tune" in notes.notes[0]


def test_a_damaged_file_is_ignored_with_a_note(decoder: Decoder) -> None:
    file = launches.write(decoder, {})
    file.write_bytes(b"\xff{")
    notes = Notes()
    assert launches.stored_launches(decoder, notes) is None
    assert len(notes.notes) == 1
