"""What a chat does where the user does not say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teal_cli.errors import TealError
from teal_cli.inference.defaults import chat_defaults, sampling_defaults, stop_token_ids
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.random_weights import SHAPES


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


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"temperature": [1.0]},
        {"temperature": True},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": 10**400},
        {"top_k": 1.5},
        {"top_k": -2},
        {"top_k": {}},
        {"top_p": 0},
        {"top_p": "1"},
        {"top_p": math.inf},
    ],
    ids=str,
)
def test_an_author_who_asks_for_nonsense_is_told_so(fields: dict[str, Any]) -> None:
    with pytest.raises(TealError, match=rf"generation_config.json.*{next(iter(fields))[:3]}"):
        sampling_defaults({"do_sample": True, **fields}, chat_defaults(SHAPES["llama-2-7b"]))


@pytest.mark.parametrize("ids", ["x", [1, "x"], {}, 1.5, True, [None]], ids=str)
def test_end_tokens_that_are_no_tokens_are_refused(ids: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Checkpoint, "__init__", lambda self: None)
    monkeypatch.setattr(Checkpoint, "name", "mine")
    monkeypatch.setattr(Checkpoint, "generation_defaults", lambda self: {"eos_token_id": ids})
    with pytest.raises(TealError, match="eos_token_id of mine"):
        _ = Checkpoint().eos_token_ids  # type: ignore[call-arg]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    import tiny
    from transformers import AutoTokenizer

    tiny.write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_an_answer_ends_at_every_token_that_says_so(tokenizer: Any) -> None:
    text, turn, end = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    assert stop_token_ids((text,), tokenizer) == {text, end}
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it whose template is ChatML
    assert stop_token_ids((), tokenizer) == {text, end}
    tokenizer.chat_template = "{{ messages[1]['content'] }} \n<|im_start|>"
    assert stop_token_ids((), tokenizer) == {text, turn}


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{{ 1 + 'a' }}", "x"])
def test_a_template_that_tells_nothing_adds_nothing(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    assert stop_token_ids((0,), tokenizer) == {0, tokenizer.eos_token_id}
