"""Answers of a step that chooses on the device, against those of the host's loop.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_stream_interpreted.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.inference import launches
from teal_cli.inference import session as sessions
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.sampling import Sampler, Sampling, candidates, penalised
from teal_cli.inference.session import Interrupted, Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder
from teal_cli.sparsity.setting import DENSE, Setting

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
)
PROMPT = [5, 81, 3, 44, 60, 12, 7]
SETTING = Setting("uniform", 0.5, torch.tensor([[0.4, 0.3, 0.5, 0.1, 0.4, 0.5, 0.05]]))


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            patch.setitem(sessions.FUSED_STEPS, "cpu", sessions.FUSED_STEPS["cuda"])
            device = "cpu"
        elif torch.cuda.is_available():
            device = "cuda"
        else:
            pytest.skip("needs a CUDA device")
        yield random_decoder(CONFIG, device=device, dtype=torch.float32, seed=0)


def _session(decoder: Decoder, backend: str, length: int = 20) -> Session:
    return Session(decoder, max_length=length, setting=SETTING, backend=backend)  # type: ignore[arg-type]


def _answer(
    session: Session, prompt: list[int], sampling: Sampling | None = None, **options: Any
) -> tuple[list[int], Finish]:
    sampler = Sampler(sampling or Sampling())
    *tokens, finish = generate(session, prompt, sampler, **options)
    assert isinstance(finish, Finish)
    return [token.id for token in tokens if isinstance(token, Token)], finish


def test_every_ending_is_the_host_loops(decoder: Decoder) -> None:
    device, host = _session(decoder, "auto"), _session(decoder, "reference")
    assert (device.backend, host.backend) == ("triton", "torch")
    said, _ = _answer(host, PROMPT, max_new_tokens=8)
    host.reset()
    stop = next(token for token in said[2:] if token not in said[:2])
    follow_up = [*PROMPT, *said[:2], 9, 8]
    cases: list[tuple[str, list[int], dict[str, Any]]] = [
        ("length", PROMPT, {"max_new_tokens": 5}),
        ("length", PROMPT, {"max_new_tokens": 1}),
        ("stop", PROMPT, {"max_new_tokens": 8, "stop_token_ids": {stop}}),
        ("length", follow_up, {"max_new_tokens": 4}),  # on what the stopped answer left
        ("stop", PROMPT, {"max_new_tokens": 8, "stop_token_ids": {said[0]}}),
        ("context", PROMPT, {"max_new_tokens": 99}),
    ]
    for reason, prompt, options in cases:
        expected, theirs = _answer(host, prompt, **options)
        tokens, ours = _answer(device, prompt, **options)
        assert (tokens, ours.reason, theirs.reason) == (expected, reason, reason)
        assert (device.tokens, device.position) == (host.tokens, host.position)
        assert ours.stats.reused_tokens == theirs.stats.reused_tokens
        assert device.realised_sparsity() == pytest.approx(host.realised_sparsity())


@pytest.mark.parametrize("count", [1, 8, 19])
def test_short_prompts_are_read_in_passes(
    count: int, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As prefill reads them: dense, with the model's own norms, after what is there."""
    session, plain = _session(decoder, "auto", 50), _session(decoder, "reference", 50)
    longer = torch.arange(26).tolist()
    for each in (session, plain):
        each.prefill(longer)
    tokens = torch.arange(60, 60 + count).tolist()
    expected = plain.prefill(tokens)

    def no_prefill(*_: Any) -> Tensor:
        raise AssertionError("prefill was asked for")

    monkeypatch.setattr(session._prefill, "layers", no_prefill)
    torch.testing.assert_close(session.prefill(tokens), expected, rtol=1e-4, atol=1e-4)
    assert session.tokens == plain.tokens == longer + tokens
    for ours, theirs in zip(session.cache.read(0, 50), plain.cache.read(0, 50), strict=True):
        torch.testing.assert_close(
            ours[:, :, : 26 + count], theirs[:, :, : 26 + count], rtol=1e-4, atol=1e-4
        )
    # What was asked of sparsity is as before.
    torch.testing.assert_close(session.step(3), plain.step(3), rtol=1e-4, atol=1e-4)


def test_a_short_prompt_that_is_stopped_keeps_the_passes_before(decoder: Decoder) -> None:
    session = _session(decoder, "auto", 50)
    flags = iter([False, True])
    with pytest.raises(Interrupted):
        session.prefill(torch.arange(20).tolist(), lambda: next(flags))
    assert session.tokens == torch.arange(8).tolist()


def test_launches_are_those_that_were_tuned_for_the_sparsity(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAL_HOME", str(tmp_path))
    table = launches.table_launches(decoder)
    dense, sparse, sparser = sorted(table)
    tuned = {
        regime: table[regime].qkv._replace(num_warps=warps)
        for regime, warps in ((dense, 1), (sparse, 2), (sparser, 8))
    }
    entries = {
        launches.matrix_key(decoder, "qkv", regime): launch._asdict()
        for regime, launch in tuned.items()
    }
    launches.write(decoder, entries)
    session = _session(decoder, "auto")
    step: Any = session._step
    assert step.chain.launches.qkv == tuned[sparse]  # the thresholds are for a sparsity near 0.5
    for sparsity, regime in ((0.1, dense), (0.3, sparse), (0.6, sparser)):
        session.use(dataclasses.replace(SETTING, target_sparsity=sparsity))
        assert step.chain.launches.qkv == tuned[regime]
        assert step.chain.launches._replace(qkv=table[regime].qkv) == table[regime]
    session.use(DENSE)
    assert step.chain.launches.qkv == tuned[dense]


def test_an_interrupted_answer_ends_where_it_was_heard(decoder: Decoder) -> None:
    device, host = _session(decoder, "auto"), _session(decoder, "reference")
    for session in (device, host):
        reading = [False] * CONFIG.num_hidden_layers
        flags = iter([*reading, False, False, True])
        tokens, finish = _answer(
            session, PROMPT, max_new_tokens=9, interrupted=lambda flags=flags: next(flags)
        )
        assert (len(tokens), finish.reason) == (3, "interrupted")
    assert device.tokens == host.tokens == [*PROMPT, *tokens[:2]]
    assert device.realised_sparsity() == pytest.approx(host.realised_sparsity())


@pytest.mark.parametrize("where", ["advance", "chosen"])
def test_an_answer_broken_off_between_launches_counts_for_nothing(
    decoder: Decoder, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, host = _session(decoder, "auto"), _session(decoder, "reference")
    steps = generate(device, PROMPT, Sampler(Sampling()), max_new_tokens=9)
    said = [next(steps) for _ in range(3)]
    monkeypatch.setattr(device._step, where, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.undo()
    theirs = generate(host, PROMPT, Sampler(Sampling()), max_new_tokens=9)
    assert said == [next(theirs) for _ in range(3)]
    assert device.tokens == host.tokens
    assert device.realised_sparsity() == pytest.approx(host.realised_sparsity())
    prompt = [*PROMPT, 3, 9]
    expected, _ = _answer(host, prompt, max_new_tokens=5)
    assert _answer(device, prompt, max_new_tokens=5)[0] == expected


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_penalty_is_the_host_loops(decoder: Decoder) -> None:
    device, host = _session(decoder, "auto", 40), _session(decoder, "reference", 40)
    sampling = Sampling(repetition_penalty=1.5)
    said, _ = _answer(host, PROMPT, sampling, max_new_tokens=8)
    assert said != _answer(_session(decoder, "reference"), PROMPT, max_new_tokens=8)[0]
    assert _answer(device, PROMPT, sampling, max_new_tokens=8)[0] == said
    # After an answer that was taken back, and without the tokens that it had seen.
    steps = generate(device, PROMPT, Sampler(sampling), max_new_tokens=9)
    for _ in range(3):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    prompt = PROMPT[:4]
    expected, _ = _answer(host, prompt, sampling, max_new_tokens=8)
    assert _answer(device, prompt, sampling, max_new_tokens=8)[0] == expected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, interpreted
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(decoder: Decoder, temperature: float) -> None:
    device = _session(decoder, "auto")
    steps = generate(device, PROMPT, Sampler(Sampling(temperature)), max_new_tokens=9)
    said = [next(steps)]
    device.cache.values[0, 0, 4, 3] = torch.nan
    with pytest.raises(TealError, match="logits are not finite"):
        said += list(steps)
    assert len(said) == 1
    assert device.tokens == PROMPT
    device.reset()
    host = _session(decoder, "reference")
    expected, _ = _answer(host, PROMPT, max_new_tokens=4)
    assert _answer(device, PROMPT, max_new_tokens=4)[0] == expected


def test_an_abandoned_answer_leaves_the_session_in_order(decoder: Decoder) -> None:
    device, host = _session(decoder, "auto"), _session(decoder, "reference")
    for session in (device, host):
        steps = generate(session, PROMPT, Sampler(Sampling()), max_new_tokens=9)
        for _ in range(3):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    assert device.tokens == host.tokens
    skips, expected = device.skips(), host.skips()
    assert skips is not None
    assert expected is not None
    torch.testing.assert_close(skips.shares, expected.shares)
    following = device.step(4), host.step(4)
    torch.testing.assert_close(*following, rtol=1e-4, atol=1e-4)


def test_the_answer_crosses_the_borders_of_the_launches_reach(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teal_kernels.gpu.step.FIRST_REACH", 2)  # then 8, 32 and 40
    device, host = _session(decoder, "auto", 40), _session(decoder, "reference", 40)
    assert (
        _answer(device, PROMPT, max_new_tokens=4)[0] == _answer(host, PROMPT, max_new_tokens=4)[0]
    )
    prompt = PROMPT * 4 + [1, 2]
    assert (
        _answer(device, prompt, max_new_tokens=5)[0] == _answer(host, prompt, max_new_tokens=5)[0]
    )


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 6, "top_p": 0.9}], ids=["plain", "top-k and top-p"]
)
def test_a_seed_repeats_the_answer(decoder: Decoder, options: dict[str, float]) -> None:
    session = _session(decoder, "auto")

    def draw(seed: int) -> list[int]:
        sampling = Sampling(5.0, seed=seed, **options)  # type: ignore[arg-type]
        session.reset()
        return _answer(session, PROMPT, sampling, max_new_tokens=4)[0]

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first


def test_what_is_drawn_is_a_candidate(decoder: Decoder) -> None:
    device, host = _session(decoder, "auto"), _session(decoder, "reference")
    sampling = Sampling(2.0, top_k=5, top_p=0.8, min_p=0.3, repetition_penalty=1.3, seed=3)
    tokens, _ = _answer(device, PROMPT, sampling, max_new_tokens=5)
    logits: Tensor = host.prefill(PROMPT)
    for token in tokens:
        assert token in candidates(penalised(logits, host.tokens, 1.3), sampling)[1]
        logits = host.step(token)
