"""The decoder against transformers on tiny random models of each family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.families import FAMILIES, hf_model, our_decoder

from teal_cli.errors import UsageError
from teal_cli.model.attention import attend
from teal_cli.model.decoder import Decoder, threshold
from teal_cli.sparsified import put_thresholds

LENGTH = 50


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def tokens(length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


def full_logits(decoder: Decoder, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return decoder.logits(decoder.forward(ids, **options))


def assert_as_exact(ours: torch.Tensor, theirs: torch.Tensor, oracle: torch.Tensor) -> None:
    """Our error against the float64 oracle is at most twice that of transformers in float32."""
    allowed = 2 * (theirs - oracle).abs().max() + 1e-6 * oracle.abs().max()
    assert (ours - oracle).abs().max() <= allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str) -> None:
    model = hf_model(family)
    ids = tokens()
    theirs = model(ids[None]).logits[0]
    ours = full_logits(our_decoder(model), ids)
    oracle = model.double()(ids[None]).logits[0]
    assert oracle.std() > 0.5
    assert_as_exact(ours, theirs, oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decode_equals_full_forward(family: str) -> None:
    decoder = our_decoder(hf_model(family))
    ids = tokens()
    expected = full_logits(decoder, ids)
    cache = decoder.new_cache(LENGTH)
    pieces = [ids[:7], ids[7:30], *ids[30:].split(1)]
    position, rows = 0, []
    for piece in pieces:
        rows.append(full_logits(decoder, piece, cache=cache, position=position))
        position += len(piece)
    torch.testing.assert_close(torch.cat(rows), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sixteen_bit_weights_are_computed_in_float32(family: str, dtype: torch.dtype) -> None:
    model = hf_model(family)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    exact, rounded = our_decoder(model), our_decoder(model, dtype)
    ids = tokens()
    assert rounded.dtype == dtype
    assert rounded.forward(ids).dtype == torch.float32
    torch.testing.assert_close(full_logits(rounded, ids), full_logits(exact, ids))
    cached = full_logits(rounded, ids, cache=rounded.new_cache(LENGTH))
    error = (cached - full_logits(exact, ids)).abs().max()  # only keys and values are rounded
    assert 0 < error < 20 * torch.finfo(dtype).eps


def random_thresholds(decoder: Decoder, *, per_projection: bool) -> torch.Tensor:
    layers = decoder.config.num_hidden_layers
    levels = 0.3 + torch.rand(layers, 7, generator=torch.Generator().manual_seed(2))
    if not per_projection:
        levels[:, 1:3], levels[:, 5] = levels[:, :1], levels[:, 4]
    return levels


@pytest.mark.parametrize("per_projection", [False, True], ids=["per-site", "per-projection"])
@pytest.mark.parametrize("sparse_from", [0, 20])
@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "qwen3"])
def test_thresholds_equal_zeroed_inputs(
    family: str, sparse_from: int, per_projection: bool
) -> None:
    model = hf_model(family)
    decoder = our_decoder(model)
    ids = tokens()
    dense = full_logits(decoder, ids)
    levels = random_thresholds(decoder, per_projection=per_projection)
    put_thresholds(model, levels, sparse_from=sparse_from)
    expected = model(ids[None]).logits[0]
    options = {"thresholds": levels, "sparse_from": sparse_from}
    torch.testing.assert_close(full_logits(decoder, ids, **options), expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(expected[:sparse_from], dense[:sparse_from])
    assert (expected[sparse_from:] - dense[sparse_from:]).abs().max() > 0.1

    cache = decoder.new_cache(LENGTH)
    rows = [full_logits(decoder, ids[:30], cache=cache, **options)]
    for position in range(30, LENGTH):
        one = ids[position : position + 1]
        rows.append(full_logits(decoder, one, cache=cache, position=position, **options))
    torch.testing.assert_close(torch.cat(rows), expected, atol=5e-5, rtol=1e-4)


def test_threshold_zero_is_exact_and_infinity_drops_everything() -> None:
    decoder = our_decoder(hf_model("llama"))
    ids = tokens()
    dense = full_logits(decoder, ids)
    levels = torch.zeros(3, 7)
    torch.testing.assert_close(full_logits(decoder, ids, thresholds=levels), dense)
    levels.fill_(torch.inf)
    hidden = decoder.embed(ids)
    for index in range(3):
        assert decoder.layer(index, hidden, thresholds=levels).equal(hidden)


@pytest.mark.parametrize("level", [-torch.inf, 0.5])
def test_threshold_keeps_what_is_not_a_number(level: float) -> None:
    x = torch.tensor([[0.1, torch.nan, 2.0]])
    assert threshold(x, level).isnan().tolist() == [[False, True, False]]


def test_threshold_compares_in_float32() -> None:
    level = 0.1  # float16 rounds it to 0.09998, which is an input's value
    x = torch.tensor([[0.1, -0.1, 0.2, 0.0]], dtype=torch.float16)
    assert threshold(x, level).tolist() == [[0.0, 0.0, x[0, 2].item(), 0.0]]
    ties = torch.tensor([[0.5, -0.5, 0.75]])
    assert threshold(ties, 0.5).tolist() == [[0.0, 0.0, 0.75]]


def test_observer_sees_every_site_before_the_threshold() -> None:
    decoder = our_decoder(hf_model("qwen3"))
    seen: list[tuple[int, str, torch.Tensor]] = []
    levels = torch.full((3, 7), 0.5)
    decoder.forward(
        tokens(), thresholds=levels, observe=lambda *call: seen.append(call), sparse_from=0
    )
    sizes = decoder.config.site_sizes
    assert [call[:2] for call in seen] == [(i, site) for i in range(3) for site in sizes]
    for _, site, x in seen:
        assert x.shape == (LENGTH, sizes[site])
        assert ((x.abs() < 0.5) & (x != 0)).any()


def test_layers_chained_equal_forward() -> None:
    decoder = our_decoder(hf_model("mistral-window"))
    ids = tokens()
    hidden = decoder.embed(ids)
    for index in range(decoder.config.num_hidden_layers):
        hidden = decoder.layer(index, hidden)
    torch.testing.assert_close(decoder.final_norm(hidden), decoder.forward(ids))


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 9), (9, 9), (5, 9), (1, 40), (12, 40), (40, 40)]
)
@pytest.mark.parametrize("window", [None, 1, 6, 64])
def test_attention_equals_its_definition(rows: int, columns: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(6, rows, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, columns, 8, generator=generator, dtype=torch.float64)
    out = attend(q, k, v, window=window)
    for head in range(6):
        for row in range(rows):
            last = columns - rows + row
            first = 0 if window is None else max(0, last - window + 1)
            scores = k[head // 3, first : last + 1] @ q[head, row] / 8**0.5
            expected = scores.softmax(0) @ v[head // 3, first : last + 1]
            torch.testing.assert_close(out[row, head], expected)


def test_one_layer_equals_a_float64_computation() -> None:
    """The formulas of a Llama layer, written out, against the decoder on float16 weights."""
    decoder = our_decoder(hf_model("llama"), torch.float16)
    config, layer = decoder.config, decoder.weights.layers[1]
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x[..., :8], x[..., 8:])
        angles = torch.arange(9.0)[:, None] * decoder.rotary.inv_freq.double()
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = hidden.double()
    qkv = norm(x, layer.input_layernorm.double()) @ layer.qkv.double()
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in qkv.split((64, 32, 32), dim=-1))
    k, v = (part.repeat_interleave(2, dim=1) for part in (turn(k), v))
    scores = torch.einsum("ihd,jhd->hij", turn(q), k) / 4
    scores.masked_fill_(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
    x = x + attended @ layer.o.double()
    mlp_in = norm(x, layer.post_attention_layernorm.double()) @ layer.gate_up.double()
    gate, up = mlp_in.chunk(2, dim=-1)
    expected = x + (gate * gate.sigmoid() * up) @ layer.down.double()
    error = (decoder.layer(1, hidden).double() - expected).abs().max() / expected.abs().max()
    assert error < 20 * torch.finfo(torch.float32).eps


def test_context_beyond_the_model_is_an_error() -> None:
    decoder = our_decoder(hf_model("llama"))
    with pytest.raises(UsageError, match="257 tokens"):
        decoder.new_cache(257)
    cache = decoder.new_cache(8)
    with pytest.raises(UsageError, match="holds 8 tokens"):
        decoder.forward(tokens(9), cache=cache)
