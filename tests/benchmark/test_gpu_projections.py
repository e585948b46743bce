"""The step's own launches under the kernel benchmark: exactly the wanted share is dropped.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_kernels.py`).
"""

from __future__ import annotations

import os

import pytest
import torch
from benchmark.subjects import TINY
from clocks import tick

from teal_cli.benchmark import projections
from teal_cli.benchmark.projections import GpuProjection
from teal_cli.inference import launches
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import random_decoder

pytestmark = pytest.mark.gpu

DENSE = 0.0


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


def check_seconds(projection: GpuProjection, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is divided by its launches; a GPU measures it with events of its own."""
    if torch.cuda.is_available():
        assert 0 < projection.seconds() < 1e-3
        return
    with monkeypatch.context() as patch:
        tick(patch, projections)
        assert projection.seconds() == pytest.approx(1 / count)


@pytest.mark.parametrize("name", launches.MATRICES)
def test_the_share_that_is_dropped_is_the_one_asked_for(
    decoder: Decoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = GpuProjection(decoder, name)
    inputs = launches.shapes(decoder)[name][0]
    for sparsity in (0.0, 0.25, 0.5):
        projection.use(projection.launches_at(sparsity, projection.choices))
        assert projection.keep(sparsity) == pytest.approx(sparsity, abs=0.51 / inputs)
        check_seconds(projection, TINY.num_hidden_layers, monkeypatch)


def test_the_lm_head_drops_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = GpuProjection(decoder, "logits")
    projection.use(projection.choices[DENSE])
    assert projection.keep(0.5) == 0
    check_seconds(projection, 4, monkeypatch)  # as many turns as an lm_head has at least


@pytest.mark.parametrize(("name", "sparsity", "count"), [("o", 0.5, 3), ("logits", 0.0, 4)])
def test_integers_are_measured_alike(
    name: str, sparsity: float, count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = QUANTIZATIONS["int4+head"]
    decoder = random_decoder(TINY, device=device, dtype=torch.float16, seed=0, kind=kind)
    projection = GpuProjection(decoder, name)
    projection.use(projection.launches_at(sparsity, projection.choices))
    assert projection.keep(sparsity) == sparsity
    check_seconds(projection, count, monkeypatch)
