"""Keys that are kept: the same logits as without, within a bound, and none of another setting."""

from __future__ import annotations

import random

import pytest
import torch

from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.serve.prefixes import Prefixes
from teal_cli.sparsity.setting import DENSE, Setting


def session_of(decoder: Decoder) -> Session:
    return Session(decoder, max_length=500, backend="reference")


def sparse(decoder: Decoder, level: float) -> Setting:
    layers = decoder.config.num_hidden_layers
    return Setting("uniform", level, torch.full((layers, 7), level))


def answer(session: Session, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits after a prompt and an answer that is decoded."""
    logits = session.prefill(prompt[session.position :])
    for token in tokens:
        logits = session.step(token)
    return logits


def test_what_is_reused_changes_no_answer(decoder: Decoder) -> None:
    """Conversations that go on in any order, each under a setting of its own, begin alike."""
    random.seed(0)
    session, opening = session_of(decoder), list(range(30))
    prefixes = Prefixes(session, 1 << 24)
    settings = [DENSE, sparse(decoder, 0.3), sparse(decoder, 0.3), sparse(decoder, 0.5)]
    talks: list[list[tuple[list[int], list[int]]]] = [[] for _ in settings]
    for _ in range(20):
        talk = random.randrange(len(settings))
        turns, setting = talks[talk], settings[talk]
        before = [token for turn in turns[-1:] for part in turn for token in part] or opening
        prompt = [*before, *(random.randrange(256) for _ in range(random.randrange(17, 30)))]
        prefixes.prepare(prompt, setting)
        assert session.tokens == prompt[: session.position]
        assert session.position >= (len(before) if turns else 0)
        spoken = [random.randrange(256) for _ in range(random.randrange(1, 10))]
        logits = answer(session, prompt, spoken)
        turns.append((prompt, spoken))

        fresh = session_of(decoder)
        fresh.use(setting)
        for turn in turns:
            expected = answer(fresh, *turn)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert max(map(len, talks)) > 3


def test_an_answer_of_another_setting_is_read_anew(decoder: Decoder) -> None:
    session, setting = session_of(decoder), sparse(decoder, 0.4)
    prefixes = Prefixes(session, 1 << 20)
    prompt, spoken = list(range(40)), list(range(50, 80))
    prefixes.prepare(prompt, setting)
    answer(session, prompt, spoken)
    following = [*prompt, *spoken, 7]
    prefixes.prepare(following, DENSE)
    assert session.position == len(prompt)  # which was read dense
    dense = session_of(decoder).prefill(following)
    torch.testing.assert_close(answer(session, following, []), dense, atol=1e-4, rtol=1e-4)
    prefixes.prepare(following, setting)
    # Of the dense reading all is good for any setting; the sparse answer itself was kept beside it.
    assert session.position == len(following) - 1
    prefixes.prepare([*prompt, *spoken[:20], 1], setting)
    assert session.position == len(prompt) + 20


@pytest.mark.parametrize("conversations", [1, 3])
def test_memory_is_bounded_and_the_oldest_goes(decoder: Decoder, conversations: int) -> None:
    session = session_of(decoder)
    size = session.cache.nbytes // session.cache.length * 50
    prefixes = Prefixes(session, conversations * size)
    prompts = [[start, *range(49)] for start in range(100, 106)]
    for prompt in prompts:
        prefixes.prepare(prompt, DENSE)
        answer(session, prompt, [])
        assert prefixes.nbytes <= conversations * size
    for prompt in prompts[-1 - conversations : -1]:  # the last is the session's own
        session.rewind(0)
        prefixes.prepare(prompt, DENSE)
        assert session.position == len(prompt) - 1
    session.rewind(0)
    prefixes.prepare(prompts[0], DENSE)
    assert session.position == 0


def test_nothing_is_kept_where_there_is_no_room(decoder: Decoder) -> None:
    session = session_of(decoder)
    prefixes = Prefixes(session, 0)
    for start in (1, 2):
        prompt = [start] * 50
        prefixes.prepare(prompt, DENSE)
        answer(session, prompt, [])
    assert prefixes.nbytes == 0
