"""A result made up by hand, and a tiny decoder."""

from __future__ import annotations

import tiny

from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.result import BenchResult, Variant, cost_card, rows
from teal_cli.benchmark.timing import Run
from teal_cli.model.random_weights import SHAPES

TINY = tiny.config(max_position_embeddings=128)


def made_up_result() -> BenchResult:
    """Dense in 100 ms, sparse in 60, transformers in 150, on a machine of 30 GB/s."""
    config, bandwidth = SHAPES["tinyllama-1.1b"], Bandwidth(30e9, "int64 sum, 2 threads")
    variants = [
        Variant("dense", "dense", "float16", 2, "numba"),
        Variant("sparse 0.5", "sparse", "float16", 2, "numba", 0.5),
        Variant("transformers", "baseline", "bfloat16", 2, "generate, static cache"),
    ]
    noise = (0.98, 1.0, 1.02)
    runs = {
        "dense": [Run(0.2, 0.1 * factor) for factor in noise],
        "sparse 0.5": [Run(0.2, 0.06 * factor, 0.49) for factor in noise],
        "transformers": [Run(0.3, 0.15 * factor) for factor in noise],
    }
    bandwidth, found = rows(variants, runs, config, [bandwidth], prompt_tokens=32, position=82)
    return BenchResult(
        model={"name": "tinyllama-1.1b", "weights": "random", "dtype": "float16"},
        environment={
            "device_name": "Test CPU",
            "threads": 2,
            "versions": {"teal": "0.1", "torch": "2.13"},
            "date": "2025-01-01T00:00:00+00:00",
        },
        settings={"tokens": 100, "prompt_tokens": 32, "repeats": 3},
        bandwidth=bandwidth,
        card=cost_card(config, bandwidth, itemsize=2, position=82, sparsities=(0.5,)),
        rows=found,
        notes=("no --baseline compile: there is no compiler",),
    )
