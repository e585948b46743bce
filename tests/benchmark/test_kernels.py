"""The kernel benchmark on a CPU, its GPU half in Triton's interpreter, and the search."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from benchmark.subjects import TINY
from clocks import tick
from interpreted import run_interpreted

from teal_cli.benchmark import kernels, projections, report
from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.tune import search
from teal_cli.errors import UnsupportedError
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent

BANDWIDTH, FASTER = Bandwidth(30e9, "made up"), Bandwidth(3e12, "made up too")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_every_matrix_has_a_row_at_every_sparsity(
    quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick(monkeypatch, projections)
    kind = QUANTIZATIONS[quantize] if quantize else None
    decoder = random_decoder(TINY, device="cpu", dtype=torch.float16, seed=0, kind=kind)
    reads = iter([BANDWIDTH, FASTER, BANDWIDTH, BANDWIDTH])
    bandwidth, rows, notes = kernels.measure_kernels(
        decoder, (0.25, 0.5), 2, lambda: next(reads), Silent()
    )
    assert bandwidth.bytes_per_s == FASTER.bytes_per_s
    assert [(row.kernel, row.target_sparsity) for row in rows] == [
        (name, level) for name in ("qkv", "o", "gate_up", "down") for level in (0.0, 0.25, 0.5)
    ]
    for row in rows:
        assert row.realised_sparsity == pytest.approx(row.target_sparsity, abs=0.51 / row.inputs)
        kept = round(row.inputs * (1 - row.realised_sparsity))
        matrix = getattr(decoder.weights.layers[0], row.kernel)
        rows_bytes = kept * (matrix.rows if kind else matrix)[0].nbytes
        assert row.bytes_read == rows_bytes + (matrix.nbytes - matrix.rows.nbytes if kind else 0)
        assert row.bandwidth_share == pytest.approx(row.bytes_per_s / FASTER.bytes_per_s)
        # A second for all layers, and for as many of F.linear's or of its four copies.
        assert row.time_us.median == pytest.approx(1e6 / TINY.num_hidden_layers)
        assert row.linear_us.median == pytest.approx(1e6 / (4 if kind else TINY.num_hidden_layers))
        assert row.speedup.median == pytest.approx(row.linear_us.median / row.time_us.median)
        assert row.bytes_per_s == pytest.approx(row.bytes_read / row.time_us.median * 1e6)
    table = report.kernel_table(rows)
    assert all(len(line) == len(table.columns) for line in table.rows)
    assert "without --kernels" in notes[0]


def test_in_the_interpreter() -> None:
    assert not run_interpreted("benchmark/test_gpu_projections.py")


def test_kernels_that_cannot_be_imported_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("no libcuda")

    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    with pytest.raises(UnsupportedError, match=r"cannot be used here \(OSError: no libcuda\)"):
        kernels.require_kernels(torch.device("cuda"))


class Tile(NamedTuple):
    block_k: int = 16
    block_n: int = 256
    num_warps: int = 4
    registers: int | None = None
    unknown: int = 3


VALUES = {
    "block_k": (8, 16, 32, 64),
    "block_n": (128, 256, 512),
    "num_warps": (2, 4, 8),
    "registers": (None, 128),
}


class Counter:
    done = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def test_search_steps_to_the_best_and_skips_what_fails() -> None:
    seen = []

    def cost(tile: Tile) -> float:
        seen.append(tile)
        if tile.num_warps == 8:
            raise RuntimeError("out of registers")
        far = abs(tile.block_k - 64) / 8 + abs(tile.block_n - 128) / 128
        return 10 + far + (tile.registers is None)

    counter = Counter()
    best, before, after = search(Tile(), VALUES, cost, 50, counter)  # type: ignore[arg-type]
    assert best == Tile(64, 128, 4, 128)
    assert (before, after) == (10 + 6 + 1 + 1, 10)
    assert len(seen) == len(set(seen)) < 40
    assert counter.done == 50


def test_search_stays_where_nothing_is_clearly_better_and_within_its_tries() -> None:
    seen = []

    def cost(tile: Tile) -> float:
        seen.append(tile)
        return 1 - 1e-4 * len(seen)

    best, _, _ = search(Tile(), VALUES, cost, 3, Counter())  # type: ignore[arg-type]
    assert best == Tile()
    assert len(seen) == 4
