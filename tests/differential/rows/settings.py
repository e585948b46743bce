"""How the next token is chosen: by the files' settings, and by the options of the command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from differential.answers import Answer, Chances
from differential.rows.chat import generation_config, says, tokenizer_config
from differential.situations import Situation, on_folder
from differential.vocabularies import SPECIAL

_END = SPECIAL[2]

# Each token is nearly as likely to come again as to be followed by the next.
_REPEATS = {
    "Ċ": {"a": 2.0},
    "a": {"a": 2.0, "b": 1.9},
    "b": {"b": 2.0, "c": 1.9},
    "c": {"c": 2.0, _END: 1.9},
}
_MOVES_ON = {"Ċ": {"a": 2.0}, "a": {"b": 2.0, "a": 1.9}, "b": {"c": 2.0, "b": 1.9}}
_AS_ASKED = {"Ċ": {"H": 2.0, "O": 1.9}, "O": {_END: 2.0}, "H": {_END: 2.0}}
_CLOSE = {
    "Ċ": {"a": 2.0, "b": 1.99},
    "a": {"b": 2.0, "c": 1.99},
    "b": {"c": 2.0, "a": 1.99},
    "c": {"a": 2.0, "b": 1.99},
}


def _greedy(name: str, same: Answer, chain: Any, **settings: Any) -> Situation:
    own = {"eos_token_id": 2, **settings}
    return Situation(
        name, same, (on_folder(generation_config(**own)),), families=("llama", "qwen2"), chain=chain
    )


def _chances(name: str, meaning: Mapping[str, Any] | None = None, **settings: Any) -> Situation:
    return Situation(
        name, Chances(meaning or {}), (on_folder(generation_config(do_sample=True, **settings)),)
    )


_THINKS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}A:"
    "{{ '\n\n' if enable_thinking is defined and not enable_thinking else '\n' }}"
)


def _option(name: str, same: Answer, chain: Any, *edits: Any) -> Situation:
    return Situation(name, same, (on_folder(*edits),), chain=chain)


OPTIONS = (
    _option(
        "--stop with a text of several tokens",
        Answer(options=("-t", "0", "--stop", "Kx"), stops=("Kx",)),
        says("O", "K", "x", "y", _END),
    ),
    _option(
        "--stop with two texts",
        Answer(options=("-t", "0", "--stop", "y", "--stop", "x"), stops=("y", "x")),
        says("O", "K", "x", "y", _END),
    ),
    _option(
        "--stop with a text that does not come",
        Answer(options=("-t", "0", "--stop", "Kz"), stops=("Kz",)),
        says("O", "K", "x", "y", _END),
    ),
    _option(
        "--repetition-penalty",
        Answer(
            options=("-t", "0", "--repetition-penalty", "1.1"),
            settings={"repetition_penalty": 1.1},
        ),
        _REPEATS,
    ),
    _option(
        "--repetition-penalty over the file's",
        Answer(
            options=("-t", "0", "--repetition-penalty", "1"), settings={"repetition_penalty": 1.0}
        ),
        _REPEATS,
        generation_config(repetition_penalty=1.3),
    ),
    _option(
        "--temperature 0 over a broken one",
        Answer(),
        says("O", "K", _END),
        generation_config(do_sample=True, temperature=-1.0),
    ),
    _option(
        "--no-think",
        Answer(options=("-t", "0", "--no-think"), template={"enable_thinking": False}),
        {"Ċ": {"t": 2.0}, "t": {_END: 2.0}, "ĊĊ": {"O": 2.0}, "O": {"K": 2.0}, "K": {_END: 2.0}},
        tokenizer_config(chat_template=_THINKS),
    ),
)

SETTINGS = (
    _greedy(
        "texts that end an answer",
        Answer(settings={"stop_strings": None}, stops=("Kx", "zz")),
        says("O", "K", "x", "y", _END),
        stop_strings=["Kx", "zz"],
    ),
    _greedy(
        "a text that ends an answer, and another given",
        Answer(options=("-t", "0", "--stop", "y"), settings={"stop_strings": None}, stops=("y",)),
        says("O", "K", "x", "y", _END),
        stop_strings="K",
    ),
    _greedy(
        "a penalty counts the prompt",
        Answer("HZ" * 2),
        {"Ċ": {"H": 2.0, "O": 1.9}, "O": {_END: 2.0}, "H": {_END: 2.0}},
        repetition_penalty=1.2,
    ),
    _greedy(
        "a temperature of 0 in the file",
        Answer(options=()),
        _CLOSE,
        do_sample=True,
        temperature=0.0,
    ),
    _greedy("a repetition penalty", Answer(), _REPEATS, repetition_penalty=1.1),
    _greedy(
        "a repetition penalty among others",
        Answer(),
        _REPEATS,
        do_sample=True,
        repetition_penalty=1.2,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
    ),
    _greedy("a penalty below 1", Answer(), _MOVES_ON, repetition_penalty=0.9),
    _greedy("no sampling", Answer(options=()), _CLOSE, do_sample=False),
    _greedy(
        "no sampling, a temperature left",
        Answer(options=()),
        _CLOSE,
        do_sample=False,
        temperature=1.5,
    ),
    *tuple(
        _greedy(
            f"a temperature of {temperature}",
            Answer(options=("-t", temperature)),
            says("O", "K", _END),
        )
        for temperature in ("1e-4", "1e-12", "1e-40", "1e-50", "1e-300")
    ),
    _chances("a temperature", temperature=0.7, top_k=0),
    _chances("a temperature, top-k and top-p", temperature=0.6, top_k=20, top_p=0.9),
    _chances("top-k -1", {"top_k": 0}, temperature=0.8, top_k=-1, top_p=0.95),
    _chances("min-p", temperature=1.2, top_k=0, min_p=0.05),
    _chances("min-p beside top-k and top-p", temperature=1.5, top_k=40, top_p=0.95, min_p=0.02),
    _chances("no temperature", top_k=5),
    _chances("top-p alone", top_p=0.5, top_k=0),
    _chances("sampling and nothing else"),
    _chances("a top-k of transformers' own", temperature=0.9),
    _chances("a top-k of transformers' own beside top-p", top_p=0.8),
    _chances("a tiny top-p", temperature=1.0, top_p=1e-06, top_k=0),
)

ROWS = (*SETTINGS, *OPTIONS)
