"""Slash commands, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from teal_cli.chat import answers, slash
from teal_cli.chat.slash import Outcome
from teal_cli.chat.state import KEYS, Chat
from teal_cli.errors import TealError, UsageError
from teal_cli.inference.chat_template import ChatTemplate


def test_sparsity_changes_the_loaded_model_at_once(chat: Chat, profile: Any) -> None:
    assert slash.run(chat, "/sparsity").text == "sparsity 0 (dense)"
    assert profile.asked == []
    assert slash.run(chat, "/sparsity 0.4").text == "sparsity 0.4, by uniform"
    thresholds = chat.session.setting.thresholds
    assert thresholds is not None
    assert float(thresholds[0, 0]) == pytest.approx(0.4)
    finish = answers.answer(chat, "Hi").finish
    assert finish.stats.realised_sparsity is not None
    slash.run(chat, "/sparsity 0")
    assert chat.session.setting.thresholds is None
    assert profile.asked == [(0.4, None)]


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "half", "0.4 0.5", "inf", "40"])
def test_a_wrong_sparsity_changes_nothing(chat: Chat, value: str) -> None:
    slash.run(chat, "/sparsity 0.4")
    with pytest.raises(UsageError, match="sparsity"):
        slash.run(chat, f"/sparsity {value}")
    assert chat.sparsity == 0.4


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("/set temperature 0.5", "temperature", "0.5"),
        ("/set top-k 5", "top-k", "5"),
        ("/set top-k -1", "top-k", "-1"),
        ("/set top_p 0.8", "top-p", "0.8"),
        ("/set min-p 0.05", "min-p", "0.05"),
        ("/set repetition_penalty 1.1", "repetition-penalty", "1.1"),
        ("/set seed 7", "seed", "7"),
        ("/set seed none", "seed", "none"),
        ("/set max-tokens 3", "max-tokens", "3"),
        ("/set think-tokens 30", "think-tokens", "30"),
    ],
)
def test_set_changes_a_setting(chat: Chat, line: str, key: str, value: str) -> None:
    outcome = slash.run(chat, line)
    assert chat.setting(key) == value
    assert f"{key} {value}" in outcome.text
    assert all(key in slash.run(chat, "/show").text for key in KEYS)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set", "takes one of temperature, top-k"),
        ("/set temperature", "and a value"),
        ("/set temperature 1 2", "and a value"),
        ("/set heat 1", "no setting 'heat'"),
        ("/set temperature hot", "takes a number, not 'hot'"),
        ("/set temperature -1", "temperature must be"),
        ("/set top-k 1.5", "takes a whole number"),
        ("/set top-k 99999999999", "top-k must be"),
        ("/set top-p 2", "top-p must be"),
        ("/set min-p nan", "min-p must be"),
        ("/set repetition-penalty 0", "repetition-penalty must be"),
        ("/set max-tokens 0", "max-tokens must be"),
        ("/set think-tokens 0", "think-tokens must be"),
        ("/think maybe", "takes on, off or auto"),
        ("/think", "no switch for thinking"),
        ("/foo", "no command /foo"),
        ("/", "no command /"),
        ("/etc/passwd is what?", "no command /etc/passwd"),
        ("/HELP", "no command /HELP"),
        ("/bye now", "/bye takes no argument"),
        ("/retry", "nothing to answer again"),
        ("/save", "/save takes"),
        ("/save x", "nothing to save yet"),
    ],
)
def test_what_cannot_be_done_is_said(chat: Chat, line: str, said: str) -> None:
    before = [chat.setting(key) for key in KEYS]
    with pytest.raises(UsageError, match=said):
        slash.run(chat, line)
    assert [chat.setting(key) for key in KEYS] == before


@pytest.mark.parametrize(
    ("line", "meant"),
    [("/hlep", "/help"), ("/HELP", "/help"), ("/sparsty 0.4", "/sparsity"), ("/exti", "/exit")],
)
def test_a_mistyped_command_is_asked_about(chat: Chat, line: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        slash.run(chat, line)
    assert str(caught.value.hint).startswith(f"Did you mean {meant}? ")
    with pytest.raises(UsageError) as caught:
        slash.run(chat, "/set temprature 1")
    assert str(caught.value.hint).startswith("Did you mean temperature? ")


def test_comparing_is_turned_on_and_off(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert "once /sparsity is above 0" in slash.run(chat, "/compare").text
    slash.run(chat, "/sparsity 40%")
    assert chat.sparsity == 0.4
    answers.answer(chat, "Hi")
    assert capsys.readouterr().out.startswith("dense\n")
    assert slash.run(chat, "/compare").text == "answers are made once"
    answers.answer(chat, "Hi")
    assert not capsys.readouterr().out.startswith("dense\n")
    assert "twice" in slash.run(chat, "/compare on").text
    with pytest.raises(UsageError, match="takes on or off"):
        slash.run(chat, "/compare maybe")


def test_a_setting_counts_from_the_next_token_on(chat: Chat) -> None:
    first = answers.answer(chat, "Hi").text
    slash.run(chat, "/set temperature 5")
    slash.run(chat, "/set seed 3")
    drawn = answers.answer(chat, "Hi", again=True).text
    assert drawn != first
    slash.run(chat, "/set seed 3")
    assert answers.answer(chat, "Hi", again=True).text == drawn
    slash.run(chat, "/set max-tokens 2")
    assert answers.answer(chat, "Hi", again=True).finish.stats.new_tokens <= 2


def test_help_names_every_command(chat: Chat) -> None:
    text = slash.run(chat, "/help").text
    names = (
        "/help /clear /sparsity /set /show /stats /save /load /system /think /compare /retry /bye"
    )
    assert all(f"{name} " in text for name in names.split())
    assert all(len(line) < 80 for line in text.splitlines())
    for name in ("/bye", "/exit", "/quit", "/q"):
        assert slash.run(chat, name) == Outcome(leave=True)
    assert slash.run(chat, "/?").text == text


def test_retry_answers_the_last_prompt_again(chat: Chat) -> None:
    answers.answer(chat, "Hi")
    assert slash.run(chat, "/retry") == Outcome(retry=True)


def test_stats_add_up(chat: Chat) -> None:
    assert slash.run(chat, "/stats").text == "nothing was answered yet"
    finishes = [answers.answer(chat, prompt).finish for prompt in ("Hi", "Hey")]
    text = slash.run(chat, "/stats").text
    assert f"2, {sum(finish.stats.new_tokens for finish in finishes)} tokens" in text
    assert f"{finishes[1].stats.reused_tokens} more found in the cache" in text
    assert f"{chat.session.position} of 300 tokens" in text


def test_a_conversation_is_saved_and_goes_on(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    if not chat.conversation.has_template:
        with pytest.raises(UsageError, match="no chat template"):
            slash.run(chat, f"/load {path}")
        with pytest.raises(UsageError, match="no chat template"):
            slash.run(chat, "/system Be brief.")
        return
    slash.run(chat, "/system Be brief. And\nkind.")
    answers.answer(chat, "Hi")
    said = chat.conversation.messages
    assert [message["role"] for message in said] == ["system", "user", "assistant"]
    assert "3 messages" in slash.run(chat, f"/save {path}").text
    assert slash.run(chat, "/system").text == "the system message is: Be brief. And\nkind."
    assert chat.conversation.messages == said
    slash.run(chat, "/clear")
    assert slash.run(chat, "/system none").text.startswith("there is no system message")
    assert slash.run(chat, "/system").text.startswith("there is no system message")
    assert chat.conversation.messages == []
    brought = "loaded 1 turn and the system message:\nBe brief. And\nkind."
    assert slash.run(chat, f"/load {path}").text == brought
    assert chat.conversation.messages == said
    chat.model = "org/other"
    assert slash.run(chat, f"/load {path}").text == f"said with org/tiny: {brought}"
    path.write_text("{")
    with pytest.raises(TealError, match="is no conversation"):
        slash.run(chat, f"/load {path}")
    assert chat.conversation.messages == said


def test_thinking_is_turned_on_and_off(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    if not chat.conversation.has_template:
        pytest.skip("needs a template")
    monkeypatch.setattr(ChatTemplate, "switches", ("thinking",))
    told = {"/think": "on", "/think off": "off", "/think on": "on", "/think auto": "as the"}
    for line, state in told.items():
        assert slash.run(chat, line).text.startswith(f"thinking is {state}")
        assert f"thinking  {state}" in slash.run(chat, "/show").text
    slash.run(chat, "/think on")
    assert slash.run(chat, "/think").text == "thinking is off"


def test_show_does_not_obey_what_others_wrote(chat: Chat) -> None:
    chat.model = "a\x1b[31mb\x07"
    assert "ab\n" in slash.run(chat, "/show").text
