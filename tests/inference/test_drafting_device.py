"""Guesses that are checked and chosen after on the device, against its answers without guesses.

On a CUDA device, or on the CPU in Triton's interpreter (see `test_stream_interpreted.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from teal_cli.errors import TealError
from teal_cli.inference import session as sessions
from teal_cli.inference.drafters import Drafter, Lookup, ModelDrafter
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.generate import Finish, Token, generate
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
            patch.setitem(sessions._FUSED_STEPS, "cpu", sessions._FUSED_STEPS["cuda"])
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
    [("greedy", False), ("greedy", True), ("temperature", False), ("all", True)],
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
