"""Conversations: prompts from the template, history, defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inference.script import Script

from teal_cli.errors import TealError, UsageError
from teal_cli.inference import session as session_module
from teal_cli.inference.conversation import Conversation, Dropped
from teal_cli.inference.generate import Finish
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.inference.text_stream import Text
from teal_cli.model.decoder import Decoder


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
    assert all(piece.text for piece in texts if isinstance(piece, Text))
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
    # The space that was not shown is what the model said, and stays in its cache.
    assert tokenizer.decode(session.tokens) == (
        f"{opening} Grüße<|im_end|>\n<|im_start|>user\nHey<|im_end|>\n<|im_start|>assistant\nBye"
    )
    assert finish.stats.reused_tokens == len(tokenizer.encode(f"{opening} Grüße"))
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


def test_a_prompt_is_answered_again_in_place_of_its_answer(start: Start, tokenizer: Any) -> None:
    conversation, session = start("One", "Two", "Three")
    ask(conversation, "Hi")
    assert conversation.last_prompt == "Hi"
    assert ask(conversation, "Hi", again=True)[0] == "Two"
    assert session.prefilled == 1  # all of the prompt is in the cache, its last logits are not
    if tokenizer.chat_template:
        assert [message["content"] for message in conversation.messages] == ["Hi", "Two"]
    ask(conversation, "Hey")
    assert len(conversation.messages) == (4 if tokenizer.chat_template else 0)


def test_a_prompt_that_was_stopped_before_its_answer_is_forgotten(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation, session = start("Hello", "Again")
    ask(conversation, "Hi")
    before = conversation.messages
    monkeypatch.setattr(Script, "prefill", Session.prefill)
    monkeypatch.setattr(session_module, "_STRETCH", 1)  # asked before every layer
    seen = len(session.tokens)
    calls = iter([False, False, True])
    said, finish = ask(conversation, "Hey", interrupted=lambda: next(calls))
    assert (said, finish.reason, finish.stats.new_tokens) == ("", "interrupted", 0)
    assert conversation.messages == before
    assert len(session.tokens) <= seen
    assert conversation.last_prompt == "Hi"


def test_what_changes_before_the_cache_is_read_anew(start: Start, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, session = start("One", "Two", "Three")
    ask(conversation, "Hi")
    conversation.set_system("Be brief.")
    _, finish = ask(conversation, "Hey")
    assert finish.stats.reused_tokens == 1  # <|im_start|>
    assert tokenizer.decode(session.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    _, finish = ask(conversation, "Hi")
    assert finish.stats.reused_tokens == finish.stats.prompt_tokens - 1


def test_a_full_context_leaves_out_the_oldest_turns(start: Start, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, session = start(*"abcdef", system="Sys")
    shares, dropped = [], []
    for turn in range(6):
        prompt = f"{turn}" * 30
        steps = list(conversation.answer(prompt, max_new_tokens=50))
        dropped.append([step.turns for step in steps if isinstance(step, Dropped)])
        shares.append(conversation.nearly_full)
    # A turn takes 52 tokens, the system message 13, a prompt 49; there is room for 200.
    assert dropped == [[], [], [], [1], [1], [1]]
    assert shares == [False, False, True, True, True, True]
    sent = tokenizer.decode(session.tokens)
    assert sent.startswith("<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\n3333")
    assert len(conversation.messages) == 13  # all is kept for /save
    conversation.restore(conversation.messages)
    assert conversation.last_prompt == "5" * 30


@pytest.mark.parametrize(("length", "dropped"), [(60, 1), (70, 2)], ids=["181", "191"])
def test_turns_make_room_down_to_three_quarters_of_the_context(
    start: Start, tokenizer: Any, length: int, dropped: int
) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, _ = start(*"abc")
    ask(conversation, "1" * 20)
    ask(conversation, "2" * 80)
    # Without the first turn there are 181 or 191 tokens, and 200 would be room enough; three
    # quarters of the context are 187.
    steps = list(conversation.answer("3" * length, max_new_tokens=50))
    assert [step.turns for step in steps if isinstance(step, Dropped)] == [dropped]


def test_a_full_context_can_also_take_no_more(start: Start, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, _ = start(*"abcdef", overflow="stop")
    for turn in range(4):
        ask(conversation, f"{turn}" * 30)
    with pytest.raises(UsageError, match="no room for an answer") as raised:
        ask(conversation, "5" * 30)
    assert "/clear" in (raised.value.hint or "")
    assert len(conversation.messages) == 8


def test_a_turn_that_is_too_long_alone_is_refused(start: Start) -> None:
    conversation, _ = start("One", max_length=60)
    ask(conversation, "Hi")
    with pytest.raises(UsageError, match="no room"):
        ask(conversation, "long " * 20)
    assert conversation.last_prompt == "Hi"


def test_what_a_stop_text_cut_off_is_not_remembered(start: Start, tokenizer: Any) -> None:
    conversation, session = start("One.END two", "Three", stop_texts=["END"])
    assert ask(conversation, "Hi")[0] == "One."
    if not tokenizer.chat_template:
        return
    assert conversation.messages[-1] == {"role": "assistant", "content": "One."}
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOne."
    _, finish = ask(conversation, "Hey")
    assert tokenizer.decode(session.tokens) == (
        f"{opening}<|im_end|>\n<|im_start|>user\nHey<|im_end|>\n<|im_start|>assistant\nThree"
    )
    # All that was said before the cut is in the cache still.
    assert finish.stats.reused_tokens == len(tokenizer.encode(opening))


def test_thinking_stays_out_of_what_comes_after(start: Start, tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, session = start("<think>\nhm\n</think>\n\nYes", "No", "So")
    *pieces, _ = conversation.answer("Hi", max_new_tokens=50)
    texts = [piece for piece in pieces if isinstance(piece, Text)]
    assert "".join(piece.text for piece in texts if piece.thinking) == "hm"
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    assert conversation.messages[-1] == answer
    _, finish = ask(conversation, "Hey")
    expected = tokenizer.apply_chat_template(conversation.messages[:-1], tokenize=False)
    assert "think" not in expected
    sent = tokenizer.decode(session.tokens)
    assert sent == expected + "<|im_start|>assistant\nNo"
    # The first prompt's tokens are in the cache; its answer was computed after the thinking.
    assert finish.stats.reused_tokens == len(tokenizer.encode(expected.partition("Yes")[0]))
    _, finish = ask(conversation, "Hey")
    assert finish.stats.reused_tokens == len(tokenizer.encode(sent))


def test_an_answer_whose_tokens_say_more_than_its_text_is_read_anew(
    start: Start, tokenizer: Any
) -> None:
    if not tokenizer.chat_template:
        pytest.skip("needs a template")
    conversation, session = start("One<|im_start|>more", "Two")
    assert ask(conversation, "Hi")[0] == "Onemore"
    ask(conversation, "Hey")
    assert tokenizer.decode(session.tokens).count("<|im_start|>") == 4
    assert "Onemore<|im_end|>" in tokenizer.decode(session.tokens)


def test_a_switch_for_thinking_reaches_the_template(
    start: Start, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tokenizer.chat_template:
        with pytest.raises(UsageError, match="no switch for thinking"):
            start("x", think=True)
        return
    with pytest.raises(UsageError, match="no switch for thinking"):
        start("x", think=False)
    source = tokenizer.chat_template + "{% if enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", source)
    conversation, session = start("One", "Two", think=False)
    assert conversation.think is False
    ask(conversation, "Hi")
    assert tokenizer.decode(session.tokens).endswith("assistant\n<think></think>One")
    conversation.set_think(None)
    ask(conversation, "Hey")
    assert tokenizer.decode(session.tokens).count("<think>") == 0


def test_bytes_that_are_no_utf8_do_no_harm(start: Start) -> None:
    conversation, _ = start("Hello")
    assert ask(conversation, "a\udcffb")[0] == "Hello"
