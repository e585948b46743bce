"""What a chat does where the user does not say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from teal_cli.errors import TealError
from teal_cli.inference.defaults import chat_defaults, left_out, sampling_defaults
from teal_cli.model.random_weights import SHAPES


def test_defaults_follow_the_size_and_the_model() -> None:
    small, large = chat_defaults(SHAPES["smollm2-135m"]), chat_defaults(SHAPES["llama-2-7b"])
    assert (small.sparsity, small.temperature) == (0.25, 0.0)
    assert (large.sparsity, large.temperature) == (0.4, 0.7)
    one_layer = replace(SHAPES["llama-2-7b"], num_hidden_layers=1, sliding_windows=(None,))
    assert chat_defaults(one_layer) == small

    assert sampling_defaults({}, large) == {"temperature": 0.7, "top_p": 0.9}
    # An author's temperature beside do_sample: false is a leftover that nothing uses.
    assert sampling_defaults({"temperature": 0.1}, large) == {"temperature": 0.7, "top_p": 0.9}
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 1}
    assert sampling_defaults(own, large) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert sampling_defaults({"do_sample": True, "top_p": 0.8}, small) == {**THEIRS, "top_p": 0.8}
    assert sampling_defaults({}, small)["temperature"] == 0.0


LARGE = chat_defaults(SHAPES["llama-2-7b"])
OURS = {"temperature": 0.7, "top_p": 0.9}
THEIRS = {"temperature": 1.0, "top_k": 50}  # transformers' own


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"do_sample": False}, {"temperature": 0.0, "top_p": 0.9}),
        ({"do_sample": 0, "temperature": 0.6}, {"temperature": 0.0, "top_p": 0.9}),
        # What a greedy answer does not use is not looked at; transformers' penalty is used by all.
        (
            {"do_sample": False, "top_p": "x", "min_p": -1, "repetition_penalty": 1.1},
            {"temperature": 0.0, "top_p": 0.9, "repetition_penalty": 1.1},
        ),
        ({"do_sample": None, "temperature": None}, OURS),
        ({"do_sample": True}, THEIRS),
        ({"do_sample": True, "temperature": None, "top_k": None}, THEIRS),
        ({"repetition_penalty": 1.05}, {**OURS, "repetition_penalty": 1.05}),
        (
            {"do_sample": True, "repetition_penalty": 1.05},
            {**THEIRS, "repetition_penalty": 1.05},
        ),
        ({"do_sample": True, "top_k": -1}, {"temperature": 1.0, "top_k": -1}),
        (
            {"do_sample": True, "temperature": None, "min_p": 0.05, "top_k": 0, "top_p": 1},
            {"temperature": 1.0, "min_p": 0.05, "top_k": 0, "top_p": 1},
        ),
    ],
    ids=str,
)
def test_what_the_author_says_is_done(stored: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_defaults(stored, LARGE) == expected


def test_what_is_given_is_not_looked_for() -> None:
    stored = {"do_sample": True, "temperature": "hot", "top_k": True, "repetition_penalty": -1}
    given = {"temperature": 0.0, "top_k": 5, "repetition_penalty": 1.2}
    assert sampling_defaults(stored, LARGE, given) == THEIRS  # what is stored is not looked at
    for name in given:
        some = {key: value for key, value in given.items() if key != name}
        with pytest.raises(TealError, match=name.replace("_", ".")) as error:
            sampling_defaults(stored, LARGE, some)
        assert error.value.hint == f"Say what you want with --{name.replace('_', '-')}."
    assert sampling_defaults({"do_sample": "no"}, LARGE, {"temperature": 0.0}) == OURS


def test_what_is_left_out_is_named() -> None:
    stored = {
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [],
        "forced_bos_token_id": None,
        "encoder_repetition_penalty": 1.0,
        "typical_p": 0.9,
        "temperature": 0.4,
        "eos_token_id": [1, 2],
        "transformers_version": "5.0",
    }
    named = ["bad_words_ids [[5], [6, 7]]", "no_repeat_ngram_size 3", "num_beams 4"]
    assert left_out(stored) == named
    assert left_out({**stored, "do_sample": True}) == [*named, "typical_p 0.9"]
    assert left_out({}) == []


def test_no_setting_of_transformers_is_passed_over() -> None:
    """All that its processors of logits read is done here, or named as left out."""
    import inspect
    import re

    from transformers import GenerationMixin

    source = inspect.getsource(GenerationMixin._get_logits_processor)
    read = set(re.findall(r"generation_config\.([a-z]\w+)", source))
    ours = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    harmless = {"max_length", "num_return_sequences", "remove_invalid_values", "renormalize_logits"}
    harmless |= {"use_cache"}
    asked = dict.fromkeys(read - ours - harmless, 7)
    assert len(asked) > 15
    named = {text.split()[0] for text in left_out({"do_sample": True, **asked})}
    assert named == set(asked)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"temperature": [1.0]},
        {"temperature": True},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": 10**400},
        {"do_sample": "yes", "temperature": 0.4},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": "1.1"},
        {"min_p": 1.5},
        {"min_p": False},
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
