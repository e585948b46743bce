"""Prefill on a CPU, against a float64 decoder that takes one token after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from cpu_decoder import Oracle, Small
from projection_cases import DTYPES
from teal_kernels.cpu import amx
from teal_kernels.cpu import layers as layers_module
from teal_kernels.cpu.tiles import FEATURES

VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"kv_heads": 4}, id="mha"),
    pytest.param({"kv_heads": 1}, id="mqa"),
    pytest.param({"bias": True}, id="biases"),
    pytest.param({"qk_norm": True, "head_dim": 16}, id="qk-norm"),
    pytest.param({"windows": (3, None, 1), "length": 200}, id="windows"),
    pytest.param({"hidden": 64, "inner": 128, "head_dim": 32, "vocab": 96}, id="whole-vectors"),
    pytest.param({"hidden": 20, "inner": 7, "vocab": 3}, id="narrower-than-a-vector"),
    pytest.param({"hidden": 560, "inner": 1100, "head_dim": 96, "length": 5}, id="several-blocks"),
    pytest.param({"head_dim": 160, "length": 150}, id="wide-heads"),
    pytest.param({"rotary": (6, 6)}, id="partial-rope"),
    pytest.param({"rotary": (0, 10), "qk_norm": True}, id="a-layer-without-rope"),
    pytest.param({"multipliers": (6.0, 0.22, 0.25), "bias": True}, id="multipliers"),
    pytest.param({"growth": 0.1}, id="growing-scores"),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN."""

    def poisoned(shape: Any, dtype: Any = float) -> Any:
        return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0, dtype=dtype)

    monkeypatch.setattr(np, "empty", poisoned)


def check(small: Small, threads: int, tolerance: float = 1e-5, **options: Any) -> None:
    """Read a sequence in parts of several sizes; compare every token's logits and cache.

    As drafts are checked, and then as prompts are read, layer by layer.
    """
    prefill = small.prefill(threads=threads, **options)
    tokens = [position * 17 % small.vocab for position in range(small.length)]
    for at_once in (True, False):
        oracle, position = Oracle(small, error=tolerance), 0
        for size in (1, 2, 5, 8, small.length):
            part = tokens[position : position + size]
            if not part:
                break
            if at_once:
                found = prefill.read(part, position)
            else:
                hidden = small.embed_tokens[part].float() * small.multipliers[0]
                for layer in range(len(small.layers)):
                    prefill.layers(hidden, position, layer, layer + 1)
                found = prefill.logits(hidden)
            for row, logits in enumerate(found):
                expected = oracle(part[row], position + row)
                torch.testing.assert_close(
                    logits.double(), expected, rtol=tolerance, atol=tolerance
                )
            position += len(part)


@pytest.mark.parametrize("threads", [1, 2, 3], ids="threads-{}".format)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_sequence(variant: dict[str, Any], threads: int) -> None:
    check(Small(**variant), threads)


# How far off the logits may be: AMX has 16 bits of a value's fraction.
UNITS = [
    pytest.param(False, 2e-5, id="vectors"),
    pytest.param(
        True, 3e-4, id="amx", marks=pytest.mark.skipif(not amx.usable(), reason="there is no AMX")
    ),
]


@pytest.mark.parametrize(("units", "tolerance"), UNITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, units: bool, tolerance: float) -> None:
    if units and dtype == torch.float32:
        pytest.skip("float32 is more than two bfloat16")
    small = Small(dtype=dtype, hidden=300, bias=True, qk_norm=True, windows=(None, 5), length=45)
    check(small, 2, tolerance, units=units)


MATRICES = ("qkv", "o", "gate_up", "down")
# Groups by matrix; 0 is int8. A model's dtypes are compiled once for vectors and once for AMX, some
# 12 s each, so that an int8 lm_head goes with those that no other test has.
GROUPS = [
    pytest.param(dict.fromkeys(MATRICES, 0), id="int8"),
    pytest.param(dict.fromkeys(MATRICES, 8), id="int4-in-parts-of-vectors"),
    pytest.param(dict.fromkeys(MATRICES, 64), id="int4"),
    pytest.param(dict.fromkeys(MATRICES, 128), id="int4-128"),
]


# AMX multiplies integers with inputs, and INT4's scales, of 16 bits of the largest: a product is
# off by some 6e-5 of its size, the logits of two layers by 2e-3 at most. Vectors multiply bytes of
# a draft's inputs, 16 bits of the largest of sixteen: logits of size 5 to 8 are off by up to 5e-4
# (a step's, by 3e-4).
FIXED = [
    pytest.param(False, 1e-3, id="vectors"),
    pytest.param(True, 4e-3, id="amx", marks=UNITS[1].marks),
]
SIZES = [
    pytest.param({"hidden": 264, "inner": 200, "head_dim": 32, "length": 45}, id="one-block"),
    pytest.param({"hidden": 832, "inner": 1672, "length": 40}, id="several-blocks"),
    # Columns that end with 16, 24 and 56 of a chunk of 64.
    pytest.param({"hidden": 312, "inner": 216, "head_dim": 10, "length": 25}, id="parts-of-chunks"),
]


@pytest.mark.parametrize(("units", "tolerance"), FIXED)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("groups", GROUPS)
def test_integers(
    groups: dict[str, int], sizes: dict[str, Any], units: bool, tolerance: float
) -> None:
    small = Small(dtype=torch.float16, bias=True, **sizes)
    small.quantize(groups)
    check(small, 2, tolerance, units=units)


@pytest.mark.parametrize("sizes", SIZES)
def test_matrices_of_several_kinds(sizes: dict[str, Any]) -> None:
    """What AMX multiplies is made anew for each; without AMX they have nothing in common."""
    small = Small(dtype=torch.float16, bias=True, **sizes)
    small.quantize({"qkv": 128, "gate_up": 0}, lm_head=True)
    check(small, 2, 4e-3 if amx.usable() else 1e-3)


AVX2 = "+avx2,+avx,+fma,+f16c,+sse4.2,+bmi,+bmi2,+popcnt,+lzcnt"
OTHERS = [
    pytest.param("haswell", AVX2, id="avx2"),
    pytest.param("alderlake", f"{AVX2},+avxvnni", id="avx-vnni"),
]


@pytest.mark.parametrize(("name", "features"), OTHERS)
def test_another_cpu(name: str, features: str) -> None:
    """LLVM ends the process over an instruction that the CPU of its target does not have."""
    if not set(features.split(",")) <= FEATURES:
        pytest.skip("what is compiled cannot be run here")
    test = f"{__file__}::test_integers[int8-one-block-vectors]"
    environment = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


def test_more_tokens_than_go_through_a_layer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, a layer at a time, is the same as all at once."""
    small = Small(length=layers_module.CHUNK + 21)
    prefill = small.prefill(threads=2)
    tokens = [position * 17 % small.vocab for position in range(small.length)]
    hidden = small.embed_tokens[tokens].clone()
    prefill.layers(hidden, 0, 0, len(small.layers))
    keys = small.keys.clone()
    parts = small.embed_tokens[tokens].split(100)
    for i, part in enumerate(parts):
        prefill.layers(part.contiguous(), 100 * i, 0, len(small.layers))
    torch.testing.assert_close(small.keys, keys)
    assert not bool(keys.isnan().any())


def test_a_run_repeats_bit_for_bit() -> None:
    small = Small(length=60)
    prefill = small.prefill(threads=2)
    runs = []
    for _ in range(2):
        hidden = small.embed_tokens[torch.arange(60) % small.vocab]
        prefill.layers(hidden, 0, 0, len(small.layers))
        runs.append(prefill.logits(hidden))
    assert torch.equal(*runs)


def test_a_nan_reaches_the_logits() -> None:
    small = Small()
    small.layers[0].down[3, 5] = torch.nan
    prefill = small.prefill(threads=2)
    hidden = small.embed_tokens[[1, 2, 3]]
    prefill.layers(hidden, 0, 0, len(small.layers))
    assert bool(prefill.logits(hidden).isnan().all())


def test_what_does_not_fit_is_refused() -> None:
    small = Small()
    prefill = small.prefill(threads=1)
    row = torch.zeros(2, small.hidden)
    with pytest.raises(ValueError, match="outside 12"):
        prefill.layers(row, small.length - 1, 0, 1)
    with pytest.raises(ValueError, match="tokens from 2 to 53"):
        prefill.read([2, small.vocab], 0)
    with pytest.raises(ValueError, match="float32"):
        prefill.layers(row.double(), 0, 0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        prefill.logits(torch.zeros(small.hidden, 2).T)
