"""The CPU's decoding step, against a float64 decoder that shares nothing with it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_decoder import Oracle, Small
from projection_cases import DTYPES
from teal_kernels.cpu import DecodeStep, team
from teal_kernels.cpu import step as step_module
from teal_kernels.cpu.team import syscall_address
from teal_kernels.tensors import RecoveryVectors

VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"kv_heads": 4}, id="mha"),
    pytest.param({"kv_heads": 1}, id="mqa"),
    pytest.param({"bias": True}, id="biases"),
    pytest.param({"qk_norm": True, "head_dim": 16}, id="qk-norm"),
    pytest.param({"windows": (3, None, 1)}, id="windows"),
    pytest.param({"rotary": (6, 6)}, id="partial-rope"),
    pytest.param({"rotary": (0, 10), "qk_norm": True}, id="a-layer-without-rope"),
    pytest.param({"multipliers": (6.0, 0.22, 0.25), "bias": True}, id="multipliers"),
    pytest.param({"growth": 0.3}, id="growing-queries"),
    pytest.param({"hidden": 64, "inner": 128, "head_dim": 32, "vocab": 96}, id="whole-vectors"),
    pytest.param({"hidden": 20, "inner": 7, "vocab": 3}, id="narrower-than-a-vector"),
]
THRESHOLDS = [
    pytest.param(None, id="dense"),
    pytest.param([0.0] * 7, id="zero"),
    pytest.param([0.7, 0.7, 0.7, 0.3, 0.6, 0.6, 0.2], id="by-site"),
    pytest.param([0.7, 0.5, 0.9, 0.3, 0.6, 0.4, 0.2], id="by-projection"),
    pytest.param([1e9] * 7, id="nothing-kept"),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN."""

    def poisoned(shape: Any, dtype: Any = float) -> Any:
        return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0, dtype=dtype)

    monkeypatch.setattr(np, "empty", poisoned)


def check(
    small: Small,
    thresholds: list[float] | None,
    threads: int,
    vectors: RecoveryVectors | None = None,
    error: float = 4e-6,
) -> None:
    step, oracle = small.step(threads=threads), Oracle(small, error)
    oracle.vectors = vectors
    step.set_vectors(vectors)
    if thresholds is not None:
        oracle.thresholds = torch.tensor([thresholds] * len(small.layers))
        step.set_thresholds(oracle.thresholds)
    for position in range(small.length):
        token = position * 17 % small.vocab
        logits = step(token, position)
        expected = oracle(token, position)
        assert logits.dtype == torch.float32
        bound = 2.5 * error
        torch.testing.assert_close(logits.double(), expected, rtol=bound, atol=bound)
    assert torch.equal(step.kept, oracle.kept)


@pytest.mark.parametrize("threads", [1, 2, 3], ids="threads-{}".format)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_sequence(
    variant: dict[str, Any], thresholds: list[float] | None, threads: int
) -> None:
    check(Small(**variant), thresholds, threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_dtypes(dtype: torch.dtype, thresholds: list[float] | None) -> None:
    check(Small(dtype=dtype, bias=True, qk_norm=True, windows=(None, 5)), thresholds, 2)


@pytest.mark.parametrize("threads", [1, 3], ids="threads-{}".format)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bias": True, "multipliers": (3.0, 0.4, 0.3)}, id="biases"),
        pytest.param({"hidden": 20, "inner": 7, "vocab": 3}, id="narrower-than-a-vector"),
        pytest.param({"qk_norm": True, "head_dim": 16, "rotary": (0, 16)}, id="qk-norm"),
    ],
)
def test_vectors_of_recovery(variant: dict[str, Any], dtype: torch.dtype, threads: int) -> None:
    small = Small(dtype=dtype, **variant)
    check(small, [0.7, 0.5, 0.9, 0.3, 0.6, 0.4, 0.2], threads, small.vectors())


@pytest.mark.parametrize("bias", [False, True], ids=["no-biases", "biases"])
def test_vectors_are_swapped_between_tokens(bias: bool) -> None:
    small = Small(bias=bias)
    step, oracle, first, second = small.step(threads=2), Oracle(small), *_two(small)
    for position, vectors in enumerate((None, first, second, first, None, second)):
        step.set_vectors(vectors)
        oracle.vectors = vectors
        torch.testing.assert_close(
            step(position, position).double(), oracle(position, position), rtol=1e-5, atol=1e-5
        )


def _two(small: Small) -> tuple[RecoveryVectors, RecoveryVectors]:
    """Two sets of vectors, the second with biases for o alone."""
    first, second = small.vectors(), small.vectors()
    none = {name: torch.zeros_like(getattr(second, name)) for name in ("qkv", "gate_up", "down")}
    return first, dataclasses.replace(second, **none)


MATRICES = ("qkv", "o", "gate_up", "down")
# Groups by matrix, and whether the lm_head is int8; 0 is int8, and groups of 8 are summed as floats
# are. A model's dtypes are compiled once, some 10 s: those here are other tests' too, as far as
# they can be.
EXACT = [
    pytest.param(dict.fromkeys(MATRICES, 0), False, id="int8"),
    pytest.param({"qkv": 0, "gate_up": 8, "down": 0}, True, id="mixed"),
]


@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize(("groups", "lm_head"), EXACT)
def test_quantized(groups: dict[str, int], lm_head: bool, thresholds: list[float] | None) -> None:
    small = Small(
        dtype=torch.float16, hidden=48, inner=72, head_dim=12, bias=True,
        rotary=(6, 0), multipliers=(3.0, 0.4, 0.3),
    )  # fmt: skip
    small.quantize(groups, lm_head=lm_head)
    # Where four products take one instruction, x is rounded to 16 bits.
    check(small, thresholds, 2, error=1e-4)
    check(small, thresholds, 2, small.vectors(), error=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3], ids="threads-{}".format)
@pytest.mark.parametrize("group", [64, 128], ids="int4-{}".format)
def test_int4(group: int, threads: int) -> None:
    """Dense, so that no channel falls to the other side of a threshold."""
    small = Small(hidden=136, inner=192, head_dim=64, vocab=40)
    small.quantize(dict.fromkeys(MATRICES, group), lm_head=True)
    wide = Small(hidden=136, inner=192, head_dim=64, vocab=40)
    wide.lm_head = small.lm_head.dequantize()
    for layer, from_layer in zip(wide.layers, small.layers, strict=True):
        for name in MATRICES:
            setattr(layer, name, getattr(from_layer, name).dequantize().contiguous())
    step, exact = small.step(threads=threads), wide.step(threads=threads)
    vectors = small.vectors()
    for position in range(small.length):
        if position == 6:
            for one in (step, exact):
                one.set_vectors(vectors)
        logits, expected = step(position * 17 % 40, position), exact(position * 17 % 40, position)
        # Products of x and a scale are rounded to 16 bits.
        assert float((logits - expected).norm() / expected.norm()) < 5e-4
    assert torch.equal(step.kept, exact.kept)


@pytest.mark.parametrize("level", [None, 0.3], ids=["dense", "sparse"])
@pytest.mark.parametrize("group", [None, 0, 64], ids=["float", "int8", "int4"])
def test_what_is_not_a_number_reaches_the_logits(group: int | None, level: float | None) -> None:
    """Of one cached value, which no norm comes to see before it is a channel of o's input."""
    small = Small(dtype=torch.float16, hidden=136, inner=192, head_dim=64)
    if group is not None:
        small.quantize(dict.fromkeys(MATRICES, group))
    step = small.step(threads=2)
    step.set_thresholds(None if level is None else torch.full((2, 7), level))
    for position in range(3):
        assert step(position, position).isfinite().all()
    small.values[1, 0, 1, 5] = torch.nan
    assert step(3, 3).isnan().all()


def test_layers_that_differ_are_refused() -> None:
    small = Small(hidden=48, inner=72, head_dim=12)
    small.quantize({"down": 0})
    small.layers[1].down = small.layers[1].down.dequantize()
    with pytest.raises(ValueError, match="the same integers or floats in every layer"):
        small.step()


def test_agrees_with_the_decoder() -> None:
    from dataclasses import replace

    from teal_cli.inference.step import step_tensors
    from teal_cli.model.random_weights import SHAPES, random_decoder

    shape = replace(SHAPES["qwen3-8b"], num_hidden_layers=2, vocab_size=300, hidden_size=256)
    config = replace(shape, intermediate_size=384, num_attention_heads=8, num_key_value_heads=2)
    decoder = random_decoder(config, device="cpu", dtype=torch.float32, seed=0)
    caches = [decoder.new_cache(8) for _ in range(2)]
    step = step_module.DecodeStep(step_tensors(decoder, caches[0]))
    thresholds = torch.full((2, 7), 0.5)
    step.set_thresholds(thresholds)
    for position in range(8):
        token = torch.tensor([position * 31])
        hidden = decoder.forward(token, cache=caches[1], position=position, thresholds=thresholds)
        logits = step(int(token), position)
        torch.testing.assert_close(logits, decoder.logits(hidden)[0], rtol=1e-4, atol=1e-4)


def test_counts_start_anew_and_thresholds_change_between_steps() -> None:
    small = Small()
    step = small.step(threads=2)
    step(1, 0)
    assert step.kept[0].tolist() == [44, 44, 44, 40, 44, 44, 75]
    step(1, 1)
    assert step.kept[1].tolist() == [88, 88, 88, 80, 88, 88, 150]
    step.clear_counts()
    step.set_thresholds(torch.full((2, 7), 1e9))
    step(1, 2)
    assert not step.kept.any()
    step.set_thresholds(None)
    step(1, 3)
    assert step.kept[0, 6] == 75


def test_logits_of_a_step_are_the_callers() -> None:
    step = Small().step(threads=2)
    first = step(1, 0)
    copy = first.clone()
    step(2, 1)
    assert torch.equal(first, copy)


def test_bad_arguments_are_named() -> None:
    small = Small()
    step = small.step(threads=1)
    for token, position in ((-1, 0), (53, 0), (0, -1), (0, 12)):
        with pytest.raises(ValueError, match="is outside 53 tokens or 12 positions"):
            step(token, position)
    small.norm = small.norm.double()
    with pytest.raises(ValueError, match=r"one dtype of torch\.float16"):
        small.step()
    small.norm = small.norm.float().repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match="contiguous"):
        small.step()


def test_an_interrupted_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Small().step(threads=3)
    expected = step(1, 0)
    step.clear_counts()
    decode = step._decode

    def interrupted(team: Any, *arguments: Any) -> None:
        if team.thread == 0:
            raise KeyboardInterrupt
        decode(team, *arguments)  # waits for thread 0, which never comes

    monkeypatch.setattr(step, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(1, 0)
    monkeypatch.undo()
    assert not step.kept.any()
    assert torch.equal(step(1, 0), expected)


def come_late(step: DecodeStep, seconds: float, then: Callable[[], None]) -> list[float]:
    """Let thread 0 come to a step so late, and do something first; the others' CPU time."""
    decode = step._decode
    spent: list[float] = []

    def slowly(mate: Any, *arguments: Any) -> None:
        if mate.thread == 0:
            time.sleep(seconds)
            then()
        started = time.thread_time()
        decode(mate, *arguments)
        if mate.thread:
            spent.append(time.thread_time() - started)

    step._decode = slowly
    return spent


def nothing() -> None:
    pass


@pytest.mark.skipif(not syscall_address(), reason="needs a futex")
def test_a_thread_that_waits_long_sleeps() -> None:
    step = Small().step(threads=3)
    expected = step(3, 0)
    spent = come_late(step, 0.5, nothing)
    assert torch.equal(step(3, 0), expected)
    assert len(spent) == 2
    assert max(spent) < 0.25  # a thread that spins, or yields to nobody, has used all of it


def test_a_sleeping_thread_is_woken_by_an_interruption() -> None:
    step = Small().step(threads=2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    come_late(step, 0.1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(3, 0)


def test_without_a_futex_threads_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Small().step(threads=3)(3, 0)
    monkeypatch.setattr(team, "syscall_address", lambda: 0)
    step = Small().step(threads=3)
    come_late(step, 0.05, nothing)
    assert torch.equal(step(3, 0), expected)


def test_steps_on_several_threads_do_not_wait_for_each_other() -> None:
    steps = [Small().step(threads=3) for _ in range(4)]
    expected = steps[0](1, 0)
    results: list[bool] = []

    def decode(step: Any) -> None:
        results.extend(torch.equal(step(1, 0), expected) for _ in range(20))

    callers = [threading.Thread(target=decode, args=(step,), daemon=True) for step in steps]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert results == [True] * 80


@pytest.mark.parametrize("blocked", [1, 2], ids=["package", "user-cache-too"])
def test_folders_that_cannot_be_written_to(blocked: int, tmp_path: Path) -> None:
    """Compiled code then goes to the user's cache, or stays in this process."""
    import teal_kernels

    code = (
        "import torch\n"
        "from teal_kernels.cpu import Projection, compiled\n"
        "y = Projection([torch.ones(3, 2)], [2])(0, torch.ones(3), torch.zeros(1))\n"
        "assert y.tolist() == [3.0, 3.0]\n"
        "print(sum(compiled.project.stats.cache_hits.values()))\n"
    )
    source, package = next(iter(teal_kernels.__path__)), tmp_path / "teal_kernels"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    places = (package / "cpu" / "__pycache__", tmp_path / "user-cache")
    for place in places[:blocked]:
        place.write_text("a file, where a folder is needed")
    home = {"HOME": str(places[1]), "XDG_CACHE_HOME": str(places[1]), "PYTHONPATH": str(tmp_path)}
    environment = os.environ | home | {"NUMBA_CACHE_DIR": ""}

    def run() -> str:
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, env=environment, cwd=tmp_path, text=True).strip()

    assert run() == "0"
    if blocked == 1:
        assert run() == "1"
