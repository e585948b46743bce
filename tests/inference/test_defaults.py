"""What a chat does where the user does not say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from teal_cli.errors import TealError
from teal_cli.inference.defaults import chat_defaults, sampling_defaults
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
