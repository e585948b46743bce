"""One benchmark, with what is needed to repeat it: a model's decoding, its matrices, or tuning."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from teal_cli.benchmark import bandwidth, bench, kernels, result, tune
from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.kernels import KernelResult
from teal_cli.benchmark.result import BenchResult
from teal_cli.benchmark.subject import Subject
from teal_cli.benchmark.tune import TuneResult
from teal_cli.environment import environment
from teal_cli.inference import launches
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter


def decoding(tested: Subject, settings: Settings, reporter: Reporter) -> BenchResult:
    """Measure a model's decoding, dense and sparse, and its baselines."""
    decoder = tested.decoder
    measured, rows, notes = bench.measure(
        decoder,
        tested.prompt,
        settings,
        tested.setting_for,
        lambda: bandwidth.measure_bandwidth(decoder.device),
        reporter,
        tested.guessers,
        tested.gguf,
    )
    card = result.cost_card(
        decoder.config,
        measured,
        itemsize=decoder.dtype.itemsize,
        quantization=decoder.weights.quantization,
        position=settings.mean_position,
        sparsities=() if tested.guessers else settings.sparsities,
    )
    return BenchResult(
        model=_model(decoder, tested.description),
        environment=environment(decoder.device),
        settings=asdict(settings),
        bandwidth=measured,
        card=card,
        rows=rows,
        notes=notes,
    )


def matrices(
    decoder: Decoder, description: dict[str, Any], settings: Settings, reporter: Reporter
) -> KernelResult:
    """Measure the matrices of a decoder one by one.

    Args:
        decoder: the model.
        description: its name, and what its weights are.
        settings: the sparsities and the repeats are theirs.
        reporter: follows the rows.
    """
    machine = environment(decoder.device)
    measured, rows, notes = kernels.measure_kernels(
        decoder,
        settings.sparsities,
        settings.repeats,
        lambda: bandwidth.measure_bandwidth(decoder.device),
        reporter,
    )
    model = _model(decoder, description)
    return KernelResult(model, machine, asdict(settings), measured, rows, notes)


def tuning(
    decoder: Decoder, description: dict[str, Any], settings: Settings, reporter: Reporter
) -> TuneResult:
    """Search and store the fastest launches of a decoder's matrices; arguments as there."""
    machine = environment(decoder.device)
    rows = tune.tune(decoder, settings.sparsities, reporter)
    stored = (f"Stored in {launches.path(decoder)}.",)
    return TuneResult(_model(decoder, description), machine, asdict(settings), rows, stored)


def _model(decoder: Decoder, description: dict[str, Any]) -> dict[str, Any]:
    return description | {"shape": asdict(decoder.config)}
