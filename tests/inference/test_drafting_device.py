"""Guesses that are checked and chosen after on the device, against its answers without guesses.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_stream_interpreted.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from teal_kernels.gpu import DecodeStep, RowChoices

from teal_cli.errors import TealError
from teal_cli.inference import drafting
from teal_cli.inference import session as sessions
from teal_cli.inference.drafters import Drafter, Lookup, ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.guesses import known
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder
from teal_cli.sparsity.setting import Setting

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
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.8, seed=3),
    "all": Sampling(
        1.1, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=4
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            patch.setitem(sessions.FUSED_STEPS, "cpu", sessions.FUSED_STEPS["cuda"])
            patch.setattr(drafting, "LENGTHS", (1, 4))  # what each takes is learnt by two passes
            device = "cpu"
        elif torch.cuda.is_available():
            device = "cuda"
        else:
            pytest.skip("needs a CUDA device")
        yield random_decoder(CONFIG, device=device, dtype=torch.float32, seed=0)


def _answer(session: Session, sampling: Sampling, most: int) -> tuple[list[int], Finish]:
    *tokens, finish = generate(session, PROMPT, Sampler(sampling), max_new_tokens=most)
    assert isinstance(finish, Finish)
    return [token.id for token in tokens if isinstance(token, Token)], finish


def _drafts(decoder: Decoder, deterministic: bool = False) -> Session:
    session = Session(decoder, max_length=64, deterministic=deterministic)
    own = Session(decoder, max_length=64, cache=session.cache, setting=SETTING)
    drafters: list[Drafter] = [Lookup(), ModelDrafter("self", own, 97, shares_cache=True)]
    session.drafting = Drafting(drafters, length=4)
    return session


@pytest.mark.parametrize(
    ("name", "deterministic"),
    [("greedy", False), ("temperature", False), ("all", True)],
)
def test_an_answer_is_the_dense_models(decoder: Decoder, name: str, deterministic: bool) -> None:
    sampling = SAMPLINGS[name]
    # The interpreter takes half a minute for what a device does at once.
    most, answers = (6, 1) if decoder.device.type == "cpu" else (50, 2)
    dense = Session(decoder, max_length=64, deterministic=deterministic)
    session = _drafts(decoder, deterministic)
    for _ in range(answers):
        expected, _ = _answer(dense, sampling, most)
        said, finish = _answer(session, sampling, most)
        assert said == expected
        assert session.tokens == [*PROMPT, *said][:-1]
        assert finish.stats.draft is not None
        assert finish.stats.draft.accepted > 0


def test_choices_that_are_not_finite_are_an_error(decoder: Decoder) -> None:
    session = _drafts(decoder)
    steps = generate(session, PROMPT, Sampler(SAMPLINGS["temperature"]), max_new_tokens=9)
    next(steps)
    session.cache.values[0, 0, 4, 3] = torch.nan
    with pytest.raises(TealError, match="logits are not finite"):
        list(steps)
    assert session.tokens == PROMPT


def test_the_host_reads_one_result_a_round(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses stay on the device until what is chosen after them is known."""
    session = _drafts(decoder)
    assert isinstance(session.drafting, Drafting)
    drafter = session.drafting.drafters[1]
    assert isinstance(drafter, ModelDrafter)
    session.drafting = Drafting([drafter], length=4)
    sampling = SAMPLINGS["temperature"]
    expected, _ = _answer(Session(decoder, max_length=64), sampling, 6)
    waits: list[int] = []
    choose = RowChoices.choose

    def chosen(choices: RowChoices, *arguments: Any, **more: Any) -> list[int]:
        waits.append(len(drafter.session.tokens))
        return choose(choices, *arguments, **more)

    def read(step: DecodeStep, position: int) -> int:
        raise AssertionError("the guesses are waited for")

    _answer(session, sampling, 2)  # learns what it takes
    session.reset()
    monkeypatch.setattr(RowChoices, "choose", chosen)
    monkeypatch.setattr(DecodeStep, "chosen", read)
    said, finish = _answer(session, sampling, 6)
    assert said == expected
    draft = finish.stats.draft
    assert draft is not None
    assert draft.accepted > 0
    assert len(waits) == draft.rounds
    # What the device guessed is known afterwards, so that it is not decoded again.
    assert drafter.session.tokens[: len(PROMPT) + 1] == [*PROMPT, said[0]]
    assert len(drafter.session.tokens) > len(PROMPT) + 1


@pytest.mark.parametrize("acceptance", [None, 0.5])
def test_the_device_guesses_on_before_the_host_knows_what_it_chose(
    acceptance: float | None, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = _drafts(decoder)
    assert isinstance(session.drafting, Drafting)
    drafter = session.drafting.drafters[1]
    assert isinstance(drafter, ModelDrafter)
    session.drafting = Drafting([drafter], length=2, acceptance=acceptance)
    most = 7 if decoder.device.type == "cpu" else 40
    started, followed = [], []
    start, follow = DecodeStep.start, DecodeStep.follow

    def starting(step: DecodeStep, *arguments: Any, **more: Any) -> None:
        started.append(step)
        start(step, *arguments, **more)

    def following(step: DecodeStep, *arguments: Any, **more: Any) -> None:
        follow(step, *arguments, **more)
        followed.append((int(step.chain.token), int(step.chain.position)))

    monkeypatch.setattr(DecodeStep, "start", starting)
    monkeypatch.setattr(DecodeStep, "follow", following)
    _answer(session, SAMPLINGS["temperature"], 2)  # learns what it takes
    assert followed  # that is compiled before it is timed
    followed.clear()
    started.clear()
    session.reset()
    said, finish = _answer(session, SAMPLINGS["temperature"], most)
    assert finish.stats.draft is not None
    assert started.count(drafter.session._step) == 1
    assert len(followed) >= finish.stats.draft.rounds - 2  # the last have no room for another
    text = [*PROMPT, *said]
    for token, position in followed:
        assert text[position] == token
    if acceptance is None:
        monkeypatch.undo()
        session = Session(decoder, max_length=64)
        assert said == _answer(session, SAMPLINGS["temperature"], most)[0]


@pytest.mark.parametrize("phase", ["guess", "choice", "ahead"])
def test_ctrl_c_in_a_round_leaves_nothing_half_accepted(
    phase: str, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SAMPLINGS["temperature"]
    expected, _ = _answer(Session(decoder, max_length=64), sampling, 5)
    session = _drafts(decoder)
    assert isinstance(session.drafting, Drafting)
    if phase == "ahead":
        session.drafting = Drafting(session.drafting.drafters, length=1)
    steps = generate(session, PROMPT, Sampler(sampling), max_new_tokens=5)
    heard = [token.id for token in [next(steps)] if isinstance(token, Token)]
    owner, name = {
        "guess": (DecodeStep, "next_token"),
        "choice": (RowChoices, "choose"),
        "ahead": (DecodeStep, "follow"),
    }[phase]

    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, property(interrupt) if phase == "guess" else interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(steps)
    monkeypatch.undo()
    assert heard == expected[:1]
    assert session.tokens == PROMPT
    assert _answer(session, sampling, 5)[0] == expected


def test_guesses_beyond_the_models_vocabulary_are_held_to_it(decoder: Decoder) -> None:
    """Vocabularies are padded differently: the model's is the smaller one here."""
    session = Session(decoder, max_length=64)
    own = Session(decoder, max_length=64)
    drafter = ModelDrafter("padded", own, 20)
    guesses = known(drafter.propose(PROMPT[2:3], 7, 4, Sampler(SAMPLINGS["temperature"]), 3))
    own.reset()
    free = ModelDrafter("free", own, 97)
    wide = known(free.propose(PROMPT[2:3], 7, 4, Sampler(SAMPLINGS["temperature"]), 3))
    assert max(wide) >= 20
    assert guesses == [min(guess, 19) for guess in wide]
    found = session.choices(7, guesses, Sampler(Sampling()), 0)
    assert found is not None
    assert found[0] == guesses


def test_turned_down_it_decodes_ahead(decoder: Decoder) -> None:
    """Where nothing pays, as on a model this small, the device goes on by itself."""
    session = _drafts(decoder)
    assert isinstance(session.drafting, Drafting)
    plain = Drafting(session.drafting.drafters)
    plain.warm_up(session)
    session.drafting = plain
    sampling = SAMPLINGS["temperature"]
    expected, _ = _answer(Session(decoder, max_length=64), sampling, 12)
    assert _answer(session, sampling, 12)[0] == expected
