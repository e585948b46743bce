"""The step's own launches under the kernel benchmark: exactly the wanted share is dropped.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_kernels.py`).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from benchmark.subjects import TINY

from teal_cli.benchmark.projections import GpuProjection
from teal_cli.inference import launches
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent

pytestmark = pytest.mark.gpu

DENSE, SPARSE = 0.0, 0.2


@pytest.fixture(scope="module")
def device() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def decoder(device: str) -> Decoder:
    return random_decoder(TINY, device=device, dtype=torch.float16, seed=0)


@pytest.mark.parametrize("name", launches.MATRICES)
def test_the_share_that_is_dropped_is_the_one_asked_for(decoder: Decoder, name: str) -> None:
    projection = GpuProjection(decoder, name)
    inputs = launches.shapes(decoder)[name][0]
    for sparsity in (0.0, 0.25, 0.5):
        projection.use(projection.launches_at(sparsity, projection.choices))
        assert projection.keep(sparsity) == pytest.approx(sparsity, abs=0.51 / inputs)
        assert projection.seconds() > 0


def test_the_lm_head_drops_nothing(decoder: Decoder) -> None:
    projection = GpuProjection(decoder, "logits")
    projection.use(projection.choices[DENSE])
    assert projection.keep(0.5) == 0
    assert projection.seconds() > 0


@pytest.mark.parametrize(("name", "sparsity"), [("o", 0.5), ("logits", 0.0)])
def test_integers_are_measured_alike(name: str, sparsity: float, device: str) -> None:
    kind = QUANTIZATIONS["int4+head"]
    decoder = random_decoder(TINY, device=device, dtype=torch.float16, seed=0, kind=kind)
    projection = GpuProjection(decoder, name)
    projection.use(projection.launches_at(sparsity, projection.choices))
    assert projection.keep(sparsity) == sparsity
    assert projection.seconds() > 0


def test_a_session_decodes_with_the_launches_that_are_stored(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("TEAL_HOME", str(tmp_path))
    table = launches.table_launches(decoder)
    other = table[SPARSE].down._replace(block_k=16, block_n=32)
    entries = {launches.matrix_key(decoder, "down", SPARSE): other._asdict()}
    launches.write(decoder, entries)
    found = launches.stored_launches(decoder, Silent())
    assert found is not None
    assert found[DENSE] == table[DENSE]
    assert found[SPARSE] == table[SPARSE]._replace(down=other)
