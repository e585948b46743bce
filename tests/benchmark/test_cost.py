"""Bytes a token against figures that were worked out by hand for published models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from teal_cli.benchmark.cost import cache_bytes, require_memory, token_bytes, weight_bytes
from teal_cli.errors import TealError
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import SHAPES, random_decoder


@pytest.mark.parametrize(
    ("name", "sparsity", "gigabytes"),
    [
        ("llama-2-7b", 0.0, 13.2),
        ("llama-2-7b", 0.5, 6.74),
        ("llama-3-8b", 0.0, 15.0),
        ("llama-3-8b", 0.5, 8.0),
    ],
)
def test_bytes_of_published_models(name: str, sparsity: float, gigabytes: float) -> None:
    total = token_bytes(SHAPES[name], itemsize=2, sparsity=sparsity).total
    assert total / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_every_part_of_llama_2_7b() -> None:
    cost = token_bytes(SHAPES["llama-2-7b"], itemsize=2, position=99)
    assert cost.projections == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) * 2
    assert cost.lm_head == 32000 * 4096 * 2
    assert cost.cache == 32 * 2 * 4096 * 100 * 2
    assert cost.other == (65 * 4096 + 4096) * 2
    assert cost.total == cost.projections + cost.lm_head + cost.cache + cost.other


def test_the_token_reads_its_whole_model_but_for_the_other_embeddings() -> None:
    config = SHAPES["llama-2-7b"]
    cost = token_bytes(config, itemsize=2)
    unread = (config.vocab_size - 1) * config.hidden_size * 2
    assert cost.total - cost.cache == weight_bytes(config, 2) - unread


def test_tied_weights_are_stored_once() -> None:
    assert weight_bytes(SHAPES["smollm2-135m"], 4) == 134_515_008 * 4


def test_integers_of_llama_2_7b() -> None:
    """Rows of 4096 outputs: 4096 bytes, or 2048 and 4 for each of 64 groups of 64; 4 an output."""
    config, half = SHAPES["llama-2-7b"], {"itemsize": 2, "sparsity": 0.5}
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = 32 * 4 * (3 * 4096 + 4096 + 2 * 11008 + 4096)
    int8 = token_bytes(config, kind=QUANTIZATIONS["int8+head"], **half)
    assert int8.projections == weights // 2 + scales  # which no skipped row saves
    assert int8.lm_head == 32000 * (4096 + 4)
    assert int8.cache == token_bytes(config, **half).cache
    int4 = token_bytes(config, kind=QUANTIZATIONS["int4"], **half)
    assert int4.projections == weights // 2 * (32 + 4) // 64 + scales
    assert int4.lm_head == 32000 * 4096 * 2


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(("smollm2-135m", name) for name in QUANTIZATIONS),
        ("tinyllama-1.1b", "int4-128+head"),
        ("qwen2.5-0.5b", "int8"),  # with biases
    ],
)
def test_integers_take_the_memory_that_is_foretold(shape: str, name: str) -> None:
    config, kind = SHAPES[shape], QUANTIZATIONS[name]
    config = dataclasses.replace(config, num_hidden_layers=1, vocab_size=77)
    config = dataclasses.replace(config, sliding_windows=(None,))
    decoder = random_decoder(config, device="cpu", dtype=torch.float16, seed=0, kind=kind)
    assert decoder.weights.nbytes == weight_bytes(config, 2, kind)


def test_a_sliding_window_bounds_the_cache_that_is_read() -> None:
    config = dataclasses.replace(SHAPES["mistral-7b"], sliding_windows=(16,) * 31 + (None,))
    cost = token_bytes(config, itemsize=2, position=99)
    assert cost.cache == 2 * 1024 * (31 * 16 + 100) * 2


def test_cache_bytes_are_what_a_cache_takes() -> None:
    assert cache_bytes(SHAPES["llama-3-8b"], 2, 8192) == 2**30


def test_too_little_memory_is_a_sentence() -> None:
    with pytest.raises(TealError, match=r"llama needs 3\.0 GB of memory, and 2\.0 GB are free"):
        require_memory(3 * 10**9, 2 * 10**9, "llama")
    require_memory(10, 10, "llama")
    require_memory(10**18, None, "where the system does not say")
