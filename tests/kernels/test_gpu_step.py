"""The fused kernels of a token step, each against the reference, and the whole step.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_gpu_interpreted.py`).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from cpu_decoder import Oracle, Small
from step_families import BASE, FAMILIES
from teal_kernels import reference
from torch import Tensor

from teal_cli.inference.step import step_tensors
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import Quantization
from teal_cli.model.random_weights import random_decoder

pytestmark = pytest.mark.gpu


def _decoder(family: str, device: str, **changes: Any) -> Decoder:
    config = ModelConfig.from_dict({**BASE, **FAMILIES[family], **changes})
    return random_decoder(config, device=device, dtype=torch.float32, seed=1)


def _step(decoder: Decoder, length: int, **options: Any) -> Any:
    from teal_kernels.gpu import DecodeStep

    cache = decoder.new_cache(length)
    cache.keys.normal_()
    cache.values.normal_()
    step = DecodeStep(step_tensors(decoder, cache), **options)
    return step, cache


def _launch_all_as(step: Any, launch: Any) -> None:
    every = dict.fromkeys(("qkv", "o", "gate_up", "down"), launch)
    step.chain.launches = step.chain.launches._replace(**every)


def _close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "thresholds"),
    [("llama", None), *((name, "spread") for name in FAMILIES if name != "qwen2")],
)
def test_step_equals_the_decoder(family: str, thresholds: str | None, device: str) -> None:
    decoder = _decoder(family, device)
    levels = None
    if thresholds:
        generator = torch.Generator().manual_seed(3)
        levels = (torch.rand(2, 7, generator=generator) * 0.8).to(device)
    step, cache = _step(decoder, 40)
    other = decoder.new_cache(40)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    step.set_thresholds(levels)
    for position, token in ((10, 3), (11, 49)):
        tokens = torch.tensor([token], device=device)
        hidden = decoder.forward(tokens, cache=other, position=position, thresholds=levels)
        _close(step(token, position), decoder.logits(hidden)[0])
    _close(cache.keys, other.keys)
    kept = step.kept.sum(0).tolist()
    sites = decoder.config.site_sizes
    if levels is None:
        widths = [sites["attn_in"]] * 3 + [sites["attn_out"]] + [sites["mlp_in"]] * 2
        assert kept == [4 * width for width in [*widths, sites["mlp_act"]]]
    else:
        assert 0 < kept[0] < 4 * sites["attn_in"]
    step.clear_counts()
    assert not step.kept.any()


@pytest.mark.parametrize("kind", ["floats", "deterministic", "int8", "int4"])
def test_vectors_of_recovery(kind: str, device: str) -> None:
    """Swapped between tokens, against float64; what was set for the next token is no more used."""
    from teal_kernels.gpu import DecodeStep, Launch

    whole = kind.startswith("int")
    small = Small(
        hidden=40 if whole else 45, inner=72 if whole else 51, head_dim=12,
        bias=kind == "floats", multipliers=(2.0, 0.4, 0.3),
        windows=(None,) * (1 if whole else 2),  # between layers, integers are as floats
    )  # fmt: skip
    if whole:
        small.quantize(dict.fromkeys(("qkv", "o", "gate_up", "down"), 64 * (kind == "int4")))
    tensors = small.tensors(device)
    step, oracle = DecodeStep(tensors, deterministic=kind == "deterministic"), Oracle(small)
    _launch_all_as(step, Launch(32, 64, 1, slots=16, more=8))
    # With int4 what follows may fall on the other side of a threshold.
    level = 0.0 if kind == "int4" else 0.3
    oracle.error = 1e-2 if kind == "int4" else oracle.error
    oracle.thresholds.fill_(level)
    step.set_thresholds(oracle.thresholds)
    first, second = small.vectors(), small.vectors()
    for position, vectors in enumerate((first, None, second)):
        step.set_vectors(vectors)
        oracle.vectors = vectors
        logits = step(position, position).cpu().double()
        small.keys, small.values = tensors.keys.cpu(), tensors.values.cpu()
        expected = oracle(position, position)
        if kind == "int4":  # a tile's sums keep 11 bits
            assert (logits - expected).norm() < 1e-2 * expected.norm()
        else:
            _close(logits, expected)


@pytest.mark.parametrize("window", [None, 5, 64, 70], ids=str)
@pytest.mark.parametrize("position", [0, 15, 63, 64, 65, 130])
def test_attention(position: int, window: int | None, device: str) -> None:
    changes = {} if window is None else {"sliding_window": window}
    decoder = _decoder(
        "mistral" if window else "llama", device, num_hidden_layers=1, head_dim=16, **changes
    )
    step, cache = _step(decoder, 131)
    chain, heads, dim = step.chain, 4, 16
    chain.qkv.normal_()
    chain.parts.fill_(torch.nan)
    chain.maxima.fill_(torch.nan)
    chain.position.fill_(position)
    q, k, v = chain.qkv.view(8, dim).split((4, 2, 2))
    cos, sin = decoder.rotary.tables(131)
    keys, values = cache.keys[0].clone(), cache.values[0].clone()
    keys[:, position] = reference.rotate(k, cos[position], sin[position])
    values[:, position] = v
    rotated = reference.rotate(q, cos[position], sin[position])
    expected = reference.attend(rotated, keys, values, position, window)

    chain.attend(0)

    _close(cache.keys[0], keys)
    _close(cache.values[0], values)
    chunk = chain.chunk
    first = 0 if window is None else max(position - window + 1, 0)
    splits = range(first // chunk, position // chunk + 1)
    maxima = chain.maxima[splits.start : splits.stop]
    share = (maxima - maxima.max(0).values).exp()
    parts = chain.parts[splits.start : splits.stop].view(-1, heads, dim)
    total = (share * chain.sums[splits.start : splits.stop]).sum(0)
    _close((share[:, :, None] * parts).sum(0).flatten() / total.repeat_interleave(dim), expected)


@pytest.mark.parametrize(
    "tile",
    [
        {"slots": 0},
        {"slots": 16, "more": 8},  # of 32 channels: now and then some are left for the loop
        {"block_k": 64, "slots": 4},  # of two groups of 32, in many rounds
    ],
    ids=["masked", "survivors", "groups"],
)
def test_projections_with_their_inputs(tile: dict[str, int], device: str) -> None:
    from teal_kernels.gpu import Launch

    decoder = _decoder("qwen2-odd", device, num_hidden_layers=1)
    layer, config = decoder.weights.layers[0], decoder.config
    step, _ = _step(decoder, 20)
    chain, launch = step.chain, Launch(32, 64, 1)._replace(**tile)
    chain.launches = chain.launches._replace(qkv=launch, gate_up=launch, down=launch)
    step.set_thresholds(torch.tensor([[0.3, 0.5, 0.7, 0.1, 0.4, 0.6, 0.2]], device=device))
    chain.h.normal_()
    levels = chain.thresholds[0]
    x = reference.rms_norm(chain.h, layer.input_layernorm, config.rms_norm_eps)
    chain.project("qkv", 0)
    _close(chain.qkv, reference.sparse_project(x, layer.qkv, (0, 60, 80, 100), levels[:3]))

    x = reference.rms_norm(chain.h, layer.post_attention_layernorm, config.rms_norm_eps)
    chain.project("gate_up", 0)
    _close(chain.gate_up, reference.sparse_project(x, layer.gate_up, (0, 97, 194), levels[4:6]))
    assert torch.equal(chain.qkv, layer.qkv_bias)  # from which the next layer's sums start

    x = reference.gated_activation(chain.gate_up)
    expected = chain.h + reference.sparse_project(x, layer.down, (0, 60), levels[6:])
    chain.project("down", 0)
    _close(chain.h, expected)


@pytest.mark.parametrize(
    ("head_dim", "group", "slots"),
    [(24, 0, 16), (24, 64, 0), (32, 0, 0), (32, 64, 16), (32, 128, 0)],
    ids=["int8", "int4-masked", "int8-masked", "int4", "int4-128-masked"],
)
def test_quantized_step_equals_the_decoder(
    head_dim: int, group: int, slots: int, device: str
) -> None:
    from teal_kernels.gpu import Launch

    config = ModelConfig.from_dict(
        {
            **BASE,
            **FAMILIES["granite"],
            "intermediate_size": 104,
            "num_hidden_layers": 1,
            # With heads of 24, matrices begin within four words of a row.
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "hidden_size": 3 * head_dim,
        }
    )
    decoder = random_decoder(
        config, device=device, dtype=torch.float32, seed=1, kind=Quantization(group, head=True)
    )
    step, cache = _step(decoder, 40)
    launch = Launch(32, 64, 1, slots=slots, more=slots // 2)
    _launch_all_as(step, launch)
    other = decoder.new_cache(40)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    levels = torch.tensor([[0.3, 0.5, 0.7, 0.1, 0.4, 0.6, 0.2]], device=device)
    if group:  # what follows q, k and v may fall on the other side of a threshold
        levels[:, 3:] = 0
    step.set_thresholds(levels)
    tokens = torch.tensor([3], device=device)
    hidden = decoder.forward(tokens, cache=other, position=10, thresholds=levels)
    logits, expected = step(3, 10), decoder.logits(hidden)[0]
    if group:  # a tile's sums keep 11 bits
        assert (logits - expected).norm() < 5e-3 * expected.norm()
    else:
        _close(logits, expected)


@pytest.mark.parametrize("window", [None, 7], ids=str)
def test_launches_reach_what_is_used_and_no_further(
    window: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal_kernels.gpu.step.FIRST_REACH", 32)
    changes = {} if window is None else {"sliding_window": window}
    decoder = _decoder("mistral" if window else "llama", device, num_hidden_layers=1, **changes)
    step, cache = _step(decoder, 150)
    other = decoder.new_cache(150)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    for position, reach in ((31, 32), (32, 64), (128, 150), (149, 150)):
        step.chain.parts.fill_(torch.nan)
        hidden = decoder.forward(torch.tensor([3], device=device), cache=other, position=position)
        _close(step(3, position), decoder.logits(hidden)[0])
        assert step.chain.reach == reach
    assert step(3, 5).isfinite().all()
    assert step.chain.reach == 32


def test_advancing_runs_ahead_of_the_reader(device: str) -> None:
    step, _ = _step(_decoder("llama", device, num_hidden_layers=1), 40)
    step.set_thresholds(torch.full((1, 7), 0.3, device=device))
    token, expected, counts = 3, [], []
    for position in (12, 13, 14):
        token = int(step(token, position).argmax())
        expected.append(token)
        counts.append(step.kept)
    step.clear_counts()
    step.start(3, 12)
    step.advance()
    step.advance()
    assert step.chosen(12) == expected[0]
    step.advance()
    assert [step.chosen(13), step.chosen(14)] == expected[1:]
    assert torch.equal(step.kept, counts[2])
    step.take_back(14)
    assert torch.equal(step.kept, counts[1])
    step.start(expected[1], 14)
    step.advance()
    assert step.chosen(14) == expected[2]
    assert torch.equal(step.kept, counts[2])
    step.take_back(15)  # what did not run
    assert torch.equal(step.kept, counts[2])
    step.take_back(14)
    assert torch.equal(step.kept, counts[1])


def test_two_steps_are_taken_back(device: str) -> None:
    """Where the host is broken off while it waits for the older one."""
    step, _ = _step(_decoder("llama", device, num_hidden_layers=1), 40)
    step.set_thresholds(torch.full((1, 7), 0.3, device=device))
    token = int(step(3, 12).argmax())
    before = step.kept
    step.start(token, 13)
    step.advance()
    step.advance()
    step.take_back(13)
    assert torch.equal(step.kept, before)


@pytest.mark.parametrize(
    ("guesses", "choices", "assumed", "token", "position"),
    [
        ([5], [5, 8], -1, 8, 12),
        ([5], [6, 8], -1, 6, 11),
        ([5, 7, 9], [5, 7, 9, 3], -1, 3, 14),
        ([5, 7, 9], [5, 6, 9, 3], -1, 6, 12),
        ([5, 7, 9, 1, 2, 2, 2], [5, 7, 9, 1, 2, 2, 2, 0], -1, 0, 18),
        ([5, 7, 9], [-1, 7, 9, 3], -1, 0, 11),  # logits that are not finite
        ([5, 7, 9], [5, 7, 9, 3], 0b101, 8, 12),  # another token than the guess
        ([5, 96, 9], [5, 96, 9, 3], 0b101, 0, 12),
        ([5, 7, 9], [6, 7, 8, 3], 0b111, 3, 14),
        ([5, 7, 9], [6, 7, 8, 3], 0b001, 8, 12),
    ],
)
def test_a_step_follows_the_guesses_that_are_right(
    guesses: list[int],
    choices: list[int],
    assumed: int,
    token: int,
    position: int,
    device: str,
) -> None:
    """The host takes all of them for right; the counts that it takes back are the step's."""
    step, _ = _step(_decoder("llama", device, num_hidden_layers=1, vocab_size=97), 40)
    step.set_thresholds(torch.full((1, 7), 0.3, device=device))
    step(3, 9)
    before, behind = step.kept, 10 + len(choices)
    said, chosen = (torch.tensor(x, dtype=torch.int32, device=device) for x in (guesses, choices))
    step.follow(said, chosen, 10, assumed=assumed)
    assert [int(step.chain.token), int(step.chain.position)] == [token, position]
    if len(guesses) == 3:
        step.advance()
        first, logits = step.kept, step.chain.logits.clone()
        step.advance()
        step.take_back(behind + 1)
        assert torch.equal(step.kept, first)
        step.take_back(behind)
        assert torch.equal(step.kept, before)
        step.start(token, position)
        step.advance()
        _close(step.chain.logits, logits)
        assert torch.equal(step.kept, first)
        step.take_back(position)
        assert torch.equal(step.kept, before)


def test_a_step_follows_within_the_cache(device: str) -> None:
    step, _ = _step(_decoder("llama", device, num_hidden_layers=1), 40)
    guesses, choices = (torch.zeros(n, dtype=torch.int32, device=device) for n in (3, 4))
    step.follow(guesses, choices, 35)
    with pytest.raises(ValueError, match="outside 40"):
        step.follow(guesses, choices, 36)


class _Breaker:
    """Launches as a step does, until so many launches are done."""

    def __init__(self, step: Any, error: BaseException) -> None:
        self.left: float = math.inf
        self._launch, self._error = step.chain._launch, error
        step.chain._launch = step.chain.chooser._launch = self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        if self.left == 0:
            raise self._error
        self.left -= 1
        self._launch(*arguments, **constants)


@pytest.mark.parametrize("deterministic", [False, True], ids=["float", "deterministic"])
def test_a_step_that_is_broken_off_leaves_nothing_behind(deterministic: bool, device: str) -> None:
    """Before each launch of the chain; on CUDA before each of the first run and of the capture."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 40, "intermediate_size": 33, "head_dim": 8}
    decoder = _decoder("qwen3", device, **sizes)
    levels = torch.full((1, 7), 0.3, device=device)
    whole, cache = _step(decoder, 40, deterministic=deterministic)
    step, other = _step(decoder, 40, deterministic=deterministic)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    settings: dict[str, Any] = {}  # the choice is the same for both
    if not deterministic:
        settings = {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "seed": 3}
        settings |= {"repetition_penalty": 1.2, "tokens": [4, 3]}
    for each in (whole, step):
        each.set_thresholds(levels)
    first = whole(7, 9)
    whole.start(3, 10, **settings)
    whole.advance()
    chosen, expected, counts = whole.chosen(10), whole.chain.logits.clone(), whole.kept

    breaker = _Breaker(step, KeyboardInterrupt())
    _close(step(7, 9), first)
    before = step.kept

    def advance(launches: float) -> None:
        """As for the first time: launch by launch, and on CUDA then captured."""
        step._graphs.clear()
        step.start(3, 10, **settings)
        breaker.left = launches
        try:
            step.advance()
        finally:
            breaker.left = math.inf

    for launches in itertools.count():
        try:
            advance(launches)
        except KeyboardInterrupt:
            with pytest.raises(RuntimeError, match="start again"):
                step.advance()
            assert torch.equal(step.kept, before)
            if device == "cuda":
                assert not torch.cuda.is_current_stream_capturing()
                assert torch.cuda.current_stream() == torch.cuda.default_stream()
            _close(step(3, 10), expected)
            assert torch.equal(step.kept, counts)
            step.take_back(10)
        else:
            break
    chosen_in = 2 if deterministic else 8  # launches, after 7 up to the logits
    assert launches == (7 + chosen_in) * (1 if device == "cpu" else 2)
    assert step.chosen(10) == chosen
    _close(step.chain.logits, expected)
    assert torch.equal(step.kept, counts)


def test_a_capture_that_is_refused_is_left(device: str) -> None:
    """What a capture does not allow ends it with an error of its own, on another stream."""
    if device == "cpu":
        return
    step, _ = _step(_decoder("llama", device, num_hidden_layers=1), 40)
    expected, launch = step(3, 10), step.chain._launch

    def waiting(*arguments: Any, **constants: Any) -> None:
        launch(*arguments, **constants)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()

    step._graphs.clear()
    step.chain._launch = waiting
    with pytest.raises(RuntimeError):
        step(3, 10)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    step.chain._launch = launch
    for _ in range(2):  # launched, then replayed
        _close(step(3, 10), expected)


@pytest.mark.parametrize(
    ("where", "kind", "sparse"),
    [
        ("value", "float", True),
        ("bias", "float", False),
        ("value", "deterministic", False),
        ("bias", "deterministic", True),
        ("value", "int8", True),
        ("bias", "int8", False),
        ("value", "int4", False),
        ("bias", "int4", True),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, interpreted
def test_what_is_not_a_number_reaches_the_logits(
    where: str, kind: str, sparse: bool, device: str
) -> None:
    """In the input of o alone, so that no norm spreads it; or in that of all that follows."""
    from teal_kernels.gpu import Launch

    config = ModelConfig.from_dict(
        {**BASE, **FAMILIES["qwen2"], "num_hidden_layers": 1, "intermediate_size": 64}
    )
    stored = {"int8": Quantization(0), "int4": Quantization(64)}.get(kind)
    decoder = random_decoder(config, device=device, dtype=torch.float32, seed=1, kind=stored)
    step, cache = _step(decoder, 40, deterministic=kind == "deterministic")
    levels = torch.full((1, 7), 0.3, device=device) if sparse else None
    step.set_thresholds(levels)
    if sparse:
        launch = Launch(32, 64, 1, slots=16, more=8)
        _launch_all_as(step, launch)
    assert step(3, 10).isfinite().all()
    broken = torch.inf if where == "value" else torch.nan
    if where == "value":
        cache.values[0, 1, 4, 2] = broken
    else:
        decoder.weights.layers[0].qkv_bias[-1] = broken
        step.set_vectors(None)
    other = decoder.new_cache(40)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    tokens = torch.tensor([3], device=device)
    hidden = decoder.forward(tokens, cache=other, position=10, thresholds=levels)
    assert decoder.logits(hidden).isnan().all()
    assert step(3, 10).isnan().all()


def test_programs_that_start_late_agree_on_the_norm(device: str) -> None:
    """Programs of several warps read the norm's scale while others write it, in every layer."""
    sizes, dtype, times = {}, torch.float32, 1  # the interpreter runs one program at a time
    if device != "cpu":
        sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 8}
        sizes |= {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
        dtype, times = torch.float16, 1000
    config = ModelConfig.from_dict({**BASE, **FAMILIES["llama"], **sizes})
    decoder = random_decoder(config, device=device, dtype=dtype, seed=1)
    step, _ = _step(decoder, 40)
    first = step(3, 10)
    assert first.isfinite().all()
    for _ in range(times):
        torch.testing.assert_close(step(3, 10), first, rtol=1e-2, atol=1e-2)


def test_what_a_caller_can_get_wrong(device: str) -> None:
    step, _ = _step(_decoder("llama", device), 40)
    with pytest.raises(ValueError, match="position 40 is outside"):
        step(0, 40)
    with pytest.raises(ValueError, match="token 50 at position 0"):
        step(50, 0)
    step.start(3, 39)
    step.advance()
    with pytest.raises(ValueError, match="full"):
        step.advance()


def test_a_deterministic_step_repeats_itself(device: str) -> None:
    from teal_kernels.gpu import Launch

    decoder = _decoder("qwen3", device, num_hidden_layers=1)
    levels = torch.full((1, 7), 0.4, device=device)
    step, cache = _step(decoder, 40, deterministic=True)
    launch = Launch(32, 64, 1, slots=16, more=8)
    _launch_all_as(step, launch)
    step.set_thresholds(levels)
    other = decoder.new_cache(40)
    other.keys.copy_(cache.keys)
    other.values.copy_(cache.values)
    tokens = torch.tensor([3], device=device)
    hidden = decoder.forward(tokens, cache=other, position=10, thresholds=levels)
    first = step(3, 10)
    _close(first, decoder.logits(hidden)[0])
    for _ in range(1 if device == "cpu" else 50):
        assert torch.equal(step(3, 10), first)
