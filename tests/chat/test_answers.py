"""Answers at a terminal: comparing, stopping, what is said beside them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from teal_cli.chat import answers, slash
from teal_cli.chat.state import Chat
from teal_cli.inference import session as session_module
from teal_cli.inference.text_stream import Text


def test_compare_answers_twice_and_keeps_the_sparse_one(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    slash.run(chat, "/set temperature 1")
    slash.run(chat, "/sparsity 0.9")
    chat.compare = True
    sampler = chat.conversation.sampler
    answer = answers.answer(chat, "Hi")
    out, err = capsys.readouterr()
    assert out.startswith("dense\n")
    assert "\nsparsity 0.9\n" in out
    dense = out.removeprefix("dense\n").partition("\n\nsparsity 0.9\n")[0]
    assert ("both say the same" in out, "they part after" in out) == (
        dense == answer.text,
        dense != answer.text,
    )
    assert [" · dense · " in line for line in err.splitlines()[:2]] == [True, False]
    assert (chat.sparsity, chat.conversation.sampler) == (0.9, sampler)
    if chat.conversation.has_template:
        assert [m["content"] for m in chat.conversation.messages] == ["Hi", answer.text]
    slash.run(chat, "/sparsity 0")
    answers.answer(chat, "Hi")
    assert "they part" not in capsys.readouterr().out


def test_compare_draws_alike_for_both(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    slash.run(chat, "/set temperature 1")
    slash.run(chat, "/sparsity 1e-30")  # skips nothing, so that only other draws could differ
    chat.compare = True
    said = []
    for _ in range(2):
        said.append(answers.answer(chat, "Hi").text)
        slash.run(chat, "/clear")  # bytes that are no text are other tokens in a second prompt
    assert capsys.readouterr().out.count("both say the same") == 2
    assert said[0] != said[1]  # a draw of its own for each prompt


def test_where_two_texts_part(chat: Chat) -> None:
    finish = answers.answer(chat, "Hi").finish

    def difference(dense: str, sparse: str) -> list[str]:
        pair = (answers.Answer(text, finish) for text in (dense, sparse))
        return answers._difference(*pair).splitlines()

    assert difference("a b", "a b")[0] == "both say the same"
    assert difference("a b c", "a x c")[:2] == [
        "they part after 1 word: “b c” when dense,",
        "“x c” when sparse",
    ]
    assert difference("a b", "a")[1] == "nothing more when sparse"
    assert difference("a b", "a")[2].startswith("dense ")


def test_a_context_that_fills_is_announced(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    if not chat.conversation.has_template:
        pytest.skip("needs a template")
    for _ in range(9):
        answers.answer(chat, "x" * 30)
    said = capsys.readouterr().err
    announced = said.index("--overflow stop")
    assert said.count("--overflow stop") == 1
    assert announced < said.index("left out from here on")


def test_ctrl_c_ends_the_answer_and_keeps_it(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Writer(answers._PlainWriter):
        def write(self, text: str) -> None:
            super().write(text)
            os.kill(os.getpid(), signal.SIGINT)  # twice at once is one wish
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answers, "_PlainWriter", Writer)
    chat.max_tokens = 200
    before = signal.getsignal(signal.SIGINT)
    answer = answers.answer(chat, "Hi")
    assert answer.finish.reason == "interrupted"
    assert 1 <= answer.finish.stats.new_tokens < 10
    out, err = capsys.readouterr()
    assert out == f"{answer.text}\n"
    assert err.rstrip().endswith("· stopped")
    assert signal.getsignal(signal.SIGINT) == before
    if chat.conversation.has_template:
        assert chat.conversation.messages[-1] == {"role": "assistant", "content": answer.text}


def test_ctrl_c_ends_the_reading_of_a_prompt(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session_module, "_STRETCH", 1)  # asked before every layer
    reads = chat.session._prefill
    layers = reads.layers

    def pressed(hidden: Any, position: int, first: int, last: int) -> Any:
        assert first == 0  # no second layer is run
        os.kill(os.getpid(), signal.SIGINT)
        return layers(hidden, position, first, last)

    monkeypatch.setattr(reads, "layers", pressed)
    answer = answers.answer(chat, "Hi")
    assert (answer.text, answer.finish.reason) == ("", "interrupted")
    out, err = capsys.readouterr()
    assert out == ""
    assert "before the answer began" in err
    assert chat.conversation.messages == []
    monkeypatch.setattr(reads, "layers", layers)
    assert answers.answer(chat, "Hi").finish.stats.new_tokens > 0


def test_a_later_ctrl_c_breaks_off_what_does_not_end(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_SAME_PRESS_S", 0.0)

    def stuck(*args: Any, **options: Any) -> Any:
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat.session._prefill, "layers", stuck)
    with pytest.raises(KeyboardInterrupt):
        answers.answer(chat, "Hi")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_answer_that_fails_ends_its_line(
    chat: Chat,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*args: Any, **options: Any) -> Iterator[Text]:
        yield Text("half a line")
        raise error

    monkeypatch.setattr(chat.conversation, "answer", fails)
    with pytest.raises(error):
        answers.answer(chat, "Hi")
    assert capsys.readouterr().out == "half a line\n"


def test_thinking_is_shown_beside_the_answer(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish = answers.answer(chat, "Hi").finish
    capsys.readouterr()
    steps = [Text("let me", True), Text(" see", True), Text("Yes"), Text("."), finish]
    monkeypatch.setattr(type(chat.conversation), "answer", lambda *_, **options: iter(steps))
    assert answers.answer(chat, "Hi").text == "Yes."
    out, err = capsys.readouterr()
    assert out == "Yes.\n"
    assert err.startswith("let me see\n")
    steps[2:4] = []  # thinking that was cut off
    assert answers.answer(chat, "Hi").text == ""
    assert capsys.readouterr().err.startswith("let me see\n")
