"""What a model may have beyond Llama, one field at a time, against transformers' models with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from model.families import hf_model, our_config

from teal_cli.benchmark.compiled import CompiledDecoding
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import _canonical
from teal_cli.model.decoder import Decoder
from teal_cli.model.hf_layout import assemble, parts
from teal_cli.model.weights import build_weights, tensor_shapes
from teal_cli.progress import Silent

IDS = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(1))
_NEUTRAL = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,  # 16 channels a head
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

# Our field, its value, and the family and settings that have it in transformers.
DEPARTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (value, {"model_type": "granite", **_NEUTRAL, name: value})
    for name, value in (
        ("embedding_multiplier", 6.0),
        ("attention_multiplier", 0.1),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 4.0),
    )
}
DEPARTURES["layers_without_rope"] = (
    (1,),
    {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 0,
    },
)
DEPARTURES["partial_rotary_factor"] = (
    0.5,
    {"model_type": "phi3", "partial_rotary_factor": 0.5, "pad_token_id": 0},
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def departed(name: str) -> tuple[Any, Decoder]:
    """A model of transformers that departs from Llama in one field, and our decoder of it."""
    value, settings = DEPARTURES[name]
    model = hf_model("llama", **settings)
    config = our_config(hf_model("llama"))
    if name == "partial_rotary_factor":
        config = replace(config, rope=replace(config.rope, partial_rotary_factor=value))
    else:
        config = replace(config, **{name: value})
    state, shapes = _split(model.state_dict(), config), tensor_shapes(config)
    weights = build_weights(
        config, lambda name: assemble(name, shapes[name], (state[part] for part in parts(name)))
    )
    return model, Decoder(config, weights)


def _split(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Phi-3's matrices apart, as Llama names them."""
    found = dict(state)
    q, kv, i = config.q_size, config.kv_size, config.intermediate_size
    for name, tensor in state.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split((q, kv, kv)), strict=True):
                found[name.replace("qkv_proj", f"{part}_proj")] = rows
        if "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.split((i, i)), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj")] = rows
    return found


@pytest.mark.parametrize("name", DEPARTURES)
def test_each_equals_transformers(name: str) -> None:
    model, decoder = departed(name)
    assert list(decoder.config.departures) == [name]
    theirs = model(IDS[None]).logits[0]
    oracle = model.double()(IDS[None]).logits[0]
    ours = decoder.logits(decoder.forward(IDS))
    allowed = 2 * (theirs - oracle).abs().max() + 1e-6 * oracle.abs().max()
    assert (ours - oracle).abs().max() <= allowed
    without = Decoder(without_departures(decoder), decoder.weights)
    assert (without.logits(without.forward(IDS)) - oracle).abs().max() > 100 * allowed


def without_departures(decoder: Decoder) -> ModelConfig:
    """The decoder's config with Llama's value in every field."""
    known = ModelConfig.__dataclass_fields__
    plain = {name: known[name].default for name in DEPARTURES if name in known}
    rope = replace(decoder.config.rope, partial_rotary_factor=1.0)
    return replace(decoder.config, **plain, rope=rope)


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_session_decodes_what_the_kernels_do_not_know_in_torch(name: str) -> None:
    _, decoder = departed(name)
    notes: list[str] = []

    class Listener(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    session = Session(decoder, max_length=64, reporter=Listener())
    assert session.backend == "torch"
    assert f"they know no {name}" in notes[0]
    session.prefill(IDS[:20])
    rows = torch.stack([session.step(int(token)) for token in IDS[20:]])
    torch.testing.assert_close(
        rows, decoder.logits(decoder.forward(IDS))[20:], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", DEPARTURES)
def test_the_baseline_has_them_too(name: str) -> None:
    _, decoder = departed(name)
    decoding = CompiledDecoding(decoder, torch.float32, IDS.tolist(), 6, lambda advance: advance)
    decoding.run()
    logits = decoder.logits(decoder.forward(torch.tensor([*IDS.tolist(), *decoding.answer])))
    assert decoding.answer == logits[39:-1].argmax(-1).tolist()


@pytest.mark.parametrize("name", DEPARTURES)
def test_a_fingerprint_changes_with_them_alone(name: str) -> None:
    _, decoder = departed(name)
    plain = _canonical(without_departures(decoder))
    assert name not in plain
    assert name in _canonical(decoder.config)
