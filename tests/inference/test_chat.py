"""Conversations: prompts from the template, history, defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.chat import Conversation, Text, chat_defaults, sampling_defaults
from teal_cli.inference.generate import Finish
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import SHAPES


class Script(Session):
    """A session whose model says what it is told to, whatever the prompt."""

    lines: list[list[int]]

    def prefill(self, tokens: Any) -> Tensor:
        self.tokens += list(tokens)
        self.queue = iter(self.lines.pop(0))
        return self._say()

    def step(self, token: int) -> Tensor:
        self.tokens.append(token)
        return self._say()

    def _say(self) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(self.queue)), 259).float()


@pytest.fixture(scope="module", params=[True, False], ids=["template", "base"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import tiny
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, chat=request.param)
    return AutoTokenizer.from_pretrained(folder)


Start = Callable[..., tuple[Conversation, Script]]


@pytest.fixture
def start(decoder: Decoder, tokenizer: Any) -> Start:
    def make(*answers: str, **options: Any) -> tuple[Conversation, Script]:
        session = Script(decoder, max_length=options.pop("max_length", 250))
        session.lines = [tokenizer.encode(text + "<|im_end|>") for text in answers]
        conversation = Conversation(
            session,
            tokenizer,
            Sampler(Sampling()),
            stop_token_ids=[tokenizer.eos_token_id],
            **options,
        )
        return conversation, session

    return make


def ask(conversation: Conversation, prompt: str, **options: Any) -> tuple[str, Finish]:
    *texts, finish = conversation.answer(prompt, **{"max_new_tokens": 50, **options})
    assert isinstance(finish, Finish)
    assert all(isinstance(piece, Text) and piece.text for piece in texts)
    return "".join(piece.text for piece in texts if isinstance(piece, Text)), finish


def test_turns_build_on_each_other(start: Start, tokenizer: Any) -> None:
    conversation, session = start(" Grüße", "Bye")
    said, finish = ask(conversation, "Hi")
    if tokenizer.chat_template is None:
        # A base model continues: its space is part of the text, and turns are apart.
        assert said == " Grüße"
        ask(conversation, "Hey")
        assert tokenizer.decode(session.tokens[:3]) == "Hey"
        assert conversation.messages == []
        return
    assert (said, finish.reason) == ("Grüße", "stop")
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(session.tokens) == opening + " Grüße"
    said, finish = ask(conversation, "Hey")
    assert said == "Bye"
    assert tokenizer.decode(session.tokens) == (
        f"{opening}Grüße<|im_end|>\n<|im_start|>user\nHey<|im_end|>\n<|im_start|>assistant\nBye"
    )
    assert finish.stats.reused_tokens == len(tokenizer.encode(opening))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_an_interrupted_answer_is_kept(start: Start, tokenizer: Any) -> None:
    conversation, _ = start("Hello there")
    presses = iter([False, False, True])
    said, finish = ask(conversation, "Hi", interrupted=lambda: next(presses))
    assert (said, finish.reason) == ("Hel", "interrupted")
    if tokenizer.chat_template:
        assert conversation.messages[-1] == {"role": "assistant", "content": "Hel"}


def test_a_turn_that_does_not_fit_is_forgotten(start: Start) -> None:
    conversation, _ = start("Hello", max_length=60)
    with pytest.raises(UsageError, match="no room"):
        ask(conversation, "long " * 20)
    assert conversation.messages == []
    assert ask(conversation, "Hi")[0] == "Hello"


def test_a_system_message_needs_a_template(start: Start, tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        with pytest.raises(UsageError, match="no chat template"):
            start("x", system="Be brief.")
        return
    conversation, session = start("Hello", system="Be brief.")
    ask(conversation, "Hi")
    assert tokenizer.decode(session.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_template_that_refuses_is_one_sentence(
    start: Start, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tokenizer.chat_template is None:
        pytest.skip("needs a template")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    conversation, _ = start("x", system="Be brief.")
    with pytest.raises(TealError, match="no system role"):
        ask(conversation, "Hi")


def test_defaults_follow_the_size_and_the_model() -> None:
    small, large = chat_defaults(SHAPES["smollm2-135m"]), chat_defaults(SHAPES["llama-2-7b"])
    assert (small.sparsity, small.temperature) == (0.25, 0.2)
    assert (large.sparsity, large.temperature) == (0.4, 0.7)
    one_layer = replace(SHAPES["llama-2-7b"], num_hidden_layers=1, sliding_windows=(None,))
    assert chat_defaults(one_layer) == small

    assert sampling_defaults({}, large) == {"temperature": 0.7, "top_p": 0.9}
    # An author's temperature beside do_sample: false is a leftover that nothing uses.
    assert sampling_defaults({"temperature": 0.1}, large) == {"temperature": 0.7, "top_p": 0.9}
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 1}
    assert sampling_defaults(own, large) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling_defaults({"do_sample": True, "top_p": 0.8}, small) == {
        "temperature": 1.0,
        "top_p": 0.8,
    }
