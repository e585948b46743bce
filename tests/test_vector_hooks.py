"""Vectors of recovery on transformers models: what our decoder computes, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.families import FAMILIES, hf_model, our_decoder
from teal_kernels.tensors import RecoveryVectors
from test_sparsified import LENGTH, SPARSE_FROM, hooks, thresholds_between_values, tokens
from threads import one_thread

import teal_cli
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Silent
from teal_cli.sparsified import put_thresholds
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.recovery import BIASES, FIELDS, Recovery, own_vectors


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    with one_thread():
        yield


def some_vectors(decoder: Decoder, *changed: str) -> RecoveryVectors:
    """The model's own, but for the fields that are named."""
    generator = torch.Generator().manual_seed(3)
    own = own_vectors(decoder)
    found = {}
    for name in FIELDS:
        noise = 0.2 * torch.randn(getattr(own, name).shape, generator=generator)
        found[name] = getattr(own, name) + (noise if name in changed else 0)
    return RecoveryVectors(**found)


@pytest.mark.parametrize("changed", [*FIELDS, "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_our_decoder(family: str, changed: str) -> None:
    model = hf_model(family)
    dense = model(tokens()).logits[0]
    decoder = our_decoder(model)
    vectors = some_vectors(decoder, *(FIELDS if changed == "all" else (changed,)))
    # Nothing is skipped, so that rounding flips no channel.
    levels = torch.full((model.config.num_hidden_layers, 7), -1.0)
    put_thresholds(model, levels, sparse_from=SPARSE_FROM, vectors=vectors)
    theirs = model(tokens()).logits[0]
    ours = decoder.forward(tokens()[0], thresholds=levels, vectors=vectors, sparse_from=SPARSE_FROM)
    torch.testing.assert_close(theirs, decoder.logits(ours), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs[:SPARSE_FROM], dense[:SPARSE_FROM])
    assert (theirs - dense)[SPARSE_FROM:].abs().mean() > 0.001


def test_thresholds_drop_what_they_have_changed() -> None:
    model = hf_model("llama")
    decoder = our_decoder(model)
    vectors = some_vectors(decoder, *BIASES)
    levels = thresholds_between_values(model, 0.5)
    put_thresholds(model, levels, sparse_from=0, vectors=vectors)
    theirs = model(tokens()).logits[0]
    ours = decoder.logits(decoder.forward(tokens()[0], thresholds=levels, vectors=vectors))
    # A channel or two may fall differently: these thresholds lie between values without vectors.
    assert (theirs - ours).abs().mean() < 1e-3 * ours.std()


def test_cached_steps_after_a_dense_prompt() -> None:
    model = hf_model("llama")
    decoder = our_decoder(model)
    vectors = some_vectors(decoder, *FIELDS)
    levels = torch.full((model.config.num_hidden_layers, 7), -1.0)
    cache = decoder.new_cache(LENGTH)
    ids = tokens()[0]
    decoder.forward(ids[:10], cache=cache)
    rows = [
        decoder.forward(row, cache=cache, position=10 + i, thresholds=levels, vectors=vectors)
        for i, row in enumerate(ids[10:].split(1))
    ]
    put_thresholds(model, levels, sparse_from=10, vectors=vectors)
    theirs = model(tokens()).logits[0, 10:]
    torch.testing.assert_close(theirs, decoder.logits(torch.cat(rows)), atol=1e-4, rtol=1e-4)


def test_sparsify_uses_those_of_the_profile_and_leaves_no_trace() -> None:
    model = hf_model("llama")
    decoder = our_decoder(model)
    windows = torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    profile = calibrate(decoder, windows, model="tiny", reporter=Silent())
    dense = model(tokens()).logits
    teal_cli.sparsify(model, profile, 0.5)
    plain = model(tokens()).logits

    vectors = some_vectors(decoder, *FIELDS)
    recovery = Recovery.nothing(decoder, {}).learnt(0.5, 0.0, vectors)
    teal_cli.sparsify(model, profile.recovered("uniform", recovery), 0.5)
    assert (model(tokens()).logits - plain)[:, SPARSE_FROM:].abs().mean() > 0.01
    teal_cli.sparsify(model, profile.recovered("uniform", recovery), 0.5, recover=False)
    assert torch.equal(model(tokens()).logits, plain)
    teal_cli.unsparsify(model)
    assert torch.equal(model(tokens()).logits, dense)
    assert hooks(model) == 0
