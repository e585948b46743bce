"""Answers as typed text: cut off before a stop text, thinking apart and within its bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import tick
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teal_cli.inference import generate as generating
from teal_cli.inference.generate import Finish, Token
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.inference.text_stream import Limits, Text, _Stops, generate_text
from teal_cli.model.decoder import Decoder


class Script(Session):
    """A session whose model says what it is told to; what is read in between changes nothing."""

    said: Iterator[int]

    def prefill(self, tokens: Any, interrupted: Any = None, reporter: Any = None) -> Tensor:
        self.tokens += list(tokens)
        return self._say()

    def step(self, token: int) -> Tensor:
        self.tokens.append(token)
        return self._say()

    def _say(self) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(next(self.said)), 400).float()


@pytest.fixture(scope="module", params=["text", "tokens", "special tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Marks of thinking as plain text, as added tokens and as special ones, as models have them."""
    import tiny
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param != "text":
        special = request.param == "special tokens"
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return tokenizer


Answer = Callable[..., tuple[str, str, Finish, list[int], Script]]


@pytest.fixture
def answer(decoder: Decoder, tokenizer: Any) -> Answer:
    """What is thought and said, how it ended, its tokens and the session."""

    def run(said: str, *, prompt: str = "Hi", chat: bool = True, **limits: Any) -> Any:
        session = Script(decoder, max_length=limits.pop("max_length", 200))
        end = tokenizer.eos_token_id
        session.said = chain(tokenizer.encode(said, add_special_tokens=False), repeat(end))
        limits = {"max_new_tokens": 50, "max_thinking_tokens": 50, "stop_token_ids": [end]} | limits
        *steps, finish = generate_text(
            session,
            tokenizer,
            tokenizer.encode(prompt, add_special_tokens=False),
            Sampler(Sampling()),
            Limits(**limits),
            chat_prompt=prompt if chat else None,
        )
        assert isinstance(finish, Finish)
        texts = [step for step in steps if isinstance(step, Text)]
        assert all(step.text for step in texts)
        assert [step.thinking for step in texts] == sorted(
            (step.thinking for step in texts), reverse=True
        )
        thought, spoken = ("".join(t.text for t in texts if t.thinking is k) for k in (True, False))
        tokens = [step.id for step in steps if isinstance(step, Token)]
        assert len(tokens) == finish.stats.new_tokens
        return thought, spoken, finish, tokens, session

    return run


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("said", "stops", "shown", "reason"),
    [
        ("one two three", ["two"], "one ", "stop"),
        ("one two three", ["th", "o t"], "one tw", "stop"),
        ("one two three", ["three"], "one two ", "stop"),
        ("one two thr", ["three"], "one two thr", "stop"),
        ("aaab", ["aab"], "a", "stop"),
        ("Zürich 世界!", ["界"], "Zürich 世", "stop"),
        ("one two", ["one"], "", "stop"),
        ("one two", [], "one two", "stop"),
    ],
)
def test_an_answer_is_cut_right_before_a_stop_text(
    answer: Answer, chat: bool, said: str, stops: list[str], shown: str, reason: str
) -> None:
    _, spoken, finish, tokens, session = answer(said, chat=chat, stop_texts=stops)
    assert (spoken, finish.reason) == (shown, reason)
    # Nothing more is made than what completes the stop text.
    assert len(session.tokens) <= len("Hi") + len(tokens)


def test_a_stop_text_within_a_token_cuts_it(decoder: Decoder, tmp_path: Path) -> None:
    import tiny
    from transformers import AutoTokenizer

    tiny.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["words!END of it"])
    session = Script(decoder, max_length=50)
    tokens = tokenizer.encode("some words!END of it", add_special_tokens=False)
    session.said = chain(tokens, [2])
    limits = Limits(30, 30, [2], ["END"])
    steps = generate_text(session, tokenizer, [60], Sampler(Sampling()), limits, chat_prompt="")
    texts = [step.text for step in steps if isinstance(step, Text)]
    assert "".join(texts) == "some words!"


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [n for n in range(len(whole) + 1) if any(whole[:n].endswith(stop) for stop in stops)]
    expected = whole
    if ends:
        first = whole[: ends[0]]
        expected = first[: -max(len(stop) for stop in stops if first.endswith(stop))]
    cut = _Stops(stops)
    shown = "".join([*map(cut.add, pieces), cut.finish()])
    assert (shown, cut.found) == (expected, bool(ends))


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    cut = _Stops(["STOP", "ok?"])
    assert [cut.add(piece) for piece in "a STO no o"] == [
        *"a ",
        "",
        "",
        "",
        "STO ",
        "n",
        "",
        "o ",
        "",
    ]
    assert cut.finish() == "o"


@pytest.mark.parametrize(
    ("prompt", "said", "thought", "spoken"),
    [
        ("Hi", "<think>\nhm\n</think>\n\nYes", "hm", "Yes"),
        ("Hi", "\n<think>hm</think>Yes", "hm", "Yes"),
        ("Hi<think>\n", "hm\n</think>\n\nYes", "hm", "Yes"),
        ("Hi<think>\n\n</think>\n\n", "Yes", "", "Yes"),
        ("Hi", "Yes", "", "Yes"),
        ("Hi", "<thin ice", "", "<thin ice"),
        ("Hi", "<", "", "<"),
        ("Hi", "<think>no end", "no end", ""),
        ("Hi", "<think>no end </thi", "no end </thi", ""),
        ("Hi", "<think></think>", "", ""),
        ("Hi", "[THINK]hm[/THINK]Yes", "hm", "Yes"),
        ("Hi", " \n Yes ", "", "Yes "),
    ],
)
def test_thinking_is_apart(
    answer: Answer, prompt: str, said: str, thought: str, spoken: str
) -> None:
    assert answer(said, prompt=prompt)[:2] == (thought, spoken)


@pytest.mark.parametrize(
    ("said", "chat"), [("Say <think> or </think>.", True), (" <think>hm", False)]
)
def test_marks_elsewhere_are_what_their_tokens_are(
    answer: Answer, tokenizer: Any, said: str, chat: bool
) -> None:
    """In an answer that did not begin with thinking, and in a base model's text."""
    tokens = tokenizer.encode(said, add_special_tokens=False)
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert answer(said, chat=chat)[:2] == ("", whole)


def test_stop_texts_are_not_looked_for_in_thinking(answer: Answer) -> None:
    thought, spoken, finish, *_ = answer("<think>a\n\nb</think>\n\nc\n\nd", stop_texts=["\n\n"])
    assert (thought, spoken, finish.reason) == ("a\n\nb", "c", "stop")


def test_thinking_has_a_budget_of_its_own(
    answer: Answer, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick(monkeypatch, generating)
    thinks = "<think>" + "x" * 30
    thought, spoken, finish, tokens, session = answer(
        thinks + "Yes it is so", max_thinking_tokens=20, max_new_tokens=8, max_length=120
    )
    assert finish.reason == "length"
    assert thought.startswith("x" * 5)
    assert len(thought) <= 20
    # The end of thinking was written for the model, which went on with its answer.
    assert "\n</think>\n\n" in tokenizer.decode(session.tokens, skip_special_tokens=False)
    assert len(spoken) == 8
    assert finish.stats.new_tokens == len(tokens)
    assert finish.stats.prompt_tokens == 2
    # A second for each token, and one for the end of thinking to be read.
    assert finish.stats.decode_s == len(tokens) + 1


def test_a_budget_that_is_not_used_up_changes_nothing(answer: Answer) -> None:
    whole = answer("<think>hm</think>Yes it is so")
    assert whole[:2] == ("hm", "Yes it is so")
    short = answer("<think>hm</think>Yes it is so", max_new_tokens=8)
    assert (short[0], short[2].reason) == ("hm", "length")
    assert "Yes it is so".startswith(short[1])
    assert len(short[1]) == 8


def test_thinking_that_fills_the_context_ends_there(answer: Answer) -> None:
    said = "<think>" + "x" * 90
    finish = answer(said, max_thinking_tokens=30, max_length=40)[2]
    assert finish.reason == "context"
    assert answer(said, max_length=40)[2].reason == "context"
