"""Slash commands, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teal_cli import console
from teal_cli.chat import answers, slash
from teal_cli.chat.slash import Outcome
from teal_cli.chat.state import KEYS, Chat
from teal_cli.errors import TealError, UsageError
from teal_cli.inference.conversation import Conversation
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
)


class FakeProfile:
    """Skips channels below the sparsity itself, and counts how often it was asked."""

    default_method = "uniform"

    def __init__(self) -> None:
        self.asked: list[tuple[float, str | None]] = []

    def thresholds(self, sparsity: float, method: str | None) -> torch.Tensor:
        self.asked.append((sparsity, method))
        return torch.full((CONFIG.num_hidden_layers, 7), sparsity)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, device="cpu", dtype=torch.float32, seed=0)


@pytest.fixture(scope="module", params=[True, False], ids=["template", "base"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import tiny
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, chat=request.param)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def profile() -> FakeProfile:
    return FakeProfile()


@pytest.fixture
def chat(
    decoder: Decoder, tokenizer: Any, profile: FakeProfile, monkeypatch: pytest.MonkeyPatch
) -> Chat:
    monkeypatch.setattr(console, "_settings", console._Settings())
    session = Session(decoder, max_length=300, backend="reference")
    conversation = Conversation(session, tokenizer, Sampler(Sampling(seed=1)), stop_token_ids=[2])
    return Chat(
        model="org/tiny",
        session=session,
        conversation=conversation,
        profile=lambda: profile,  # type: ignore[arg-type, return-value]
        method=None,
        sparsity=0.0,
        max_tokens=8,
    )


def test_sparsity_changes_the_loaded_model_at_once(chat: Chat, profile: FakeProfile) -> None:
    assert slash.run(chat, "/sparsity").text == "sparsity 0 (dense)"
    assert profile.asked == []
    assert slash.run(chat, "/sparsity 0.4").text == "sparsity 0.4, by uniform"
    thresholds = chat.session.thresholds
    assert thresholds is not None
    assert float(thresholds[0, 0]) == pytest.approx(0.4)
    finish = answers.answer(chat, "Hi").finish
    assert finish.stats.realised_sparsity is not None
    slash.run(chat, "/sparsity 0")
    assert chat.session.thresholds is None
    assert profile.asked == [(0.4, None)]


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "half", "0.4 0.5", "inf"])
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
        ("/set top_p 0.8", "top-p", "0.8"),
        ("/set seed 7", "seed", "7"),
        ("/set seed none", "seed", "none"),
        ("/set max-tokens 3", "max-tokens", "3"),
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
        ("/set max-tokens 0", "max-tokens must be"),
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
    names = "/help /clear /sparsity /set /show /stats /save /load /system /retry /bye"
    assert all(f"{name} " in text for name in names.split())
    assert all(len(line) < 80 for line in text.splitlines())
    assert slash.run(chat, "/bye") == Outcome(leave=True)


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
    slash.run(chat, "/clear")
    slash.run(chat, "/system")
    assert chat.conversation.messages == []
    assert slash.run(chat, f"/load {path}").text == "loaded 3 messages"
    assert chat.conversation.messages == said
    chat.model = "org/other"
    assert slash.run(chat, f"/load {path}").text == "loaded 3 messages, said with org/tiny"
    path.write_text("{")
    with pytest.raises(TealError, match="is no conversation"):
        slash.run(chat, f"/load {path}")
    assert chat.conversation.messages == said


def test_show_does_not_obey_what_others_wrote(chat: Chat) -> None:
    chat.model = "a\x1b[31mb\x07"
    assert "ab\n" in slash.run(chat, "/show").text


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
    assert "they part after" in out or "both say the same" in out
    assert [" · dense · " in line for line in err.splitlines()[:2]] == [True, False]
    assert (chat.sparsity, chat.conversation.sampler) == (0.9, sampler)
    if chat.conversation.has_template:
        assert [m["content"] for m in chat.conversation.messages] == ["Hi", answer.text]
    slash.run(chat, "/sparsity 0")
    answers.answer(chat, "Hi")
    assert "they part" not in capsys.readouterr().out


def test_where_two_texts_part(chat: Chat) -> None:
    finish = answers.answer(chat, "Hi").finish

    def difference(dense: str, sparse: str) -> str:
        pair = (answers.Answer(text, finish) for text in (dense, sparse))
        return answers._difference(*pair).splitlines()[0]

    assert difference("a b", "a b") == "both say the same"
    assert difference("a b c", "a x c") == "they part after 1 words: dense “b c”, sparse “x c”"
    assert difference("a b", "a") == "they part after 1 words: dense “b”, sparse ends there"


def test_a_context_that_fills_is_announced(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    if not chat.conversation.has_template:
        pytest.skip("needs a template")
    for _ in range(9):
        answers.answer(chat, "x" * 30)
    said = capsys.readouterr().err
    announced = said.index("--overflow stop")
    assert said.count("--overflow stop") == 1
    assert announced < said.index("left out from here on")
