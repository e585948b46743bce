"""Prompts, ends of answers, and how the next token is chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from differential.comparisons import Answer, Chances, NoAnswer, Prompt
from differential.situations import EVERY, IN_GGUF, Situation, as_gguf, on_folder, path
from differential.vocabularies import SPECIAL, byte_level, sentencepiece
from model.edits import REMOVED, edit_json
from model.edits import write as write_file
from tiny import CHAT_TEMPLATE

_TEXT, _START, _END = SPECIAL
_settings = partial(edit_json, "generation_config.json")
_tokenizer = partial(edit_json, "tokenizer_config.json")


def says(*tokens: str) -> Mapping[str, Mapping[str, float]]:
    """An answer to every prompt that the template ends with a line break."""
    return path("Ċ", *tokens)


def _ends(name: str, ends: tuple[str, ...], last: str, *edits: Any, **more: Any) -> Situation:
    """A model that goes on behind `last`, which ends its answer; `ends` are the oracle's."""
    families = more.pop("families", ("llama", "qwen2"))
    chain = {**says("O", "K", last, "u", "s", _END if last != _END else _TEXT)}
    return Situation(
        name, Answer(ends=ends), (on_folder(*edits),), families=families, chain=chain, **more
    )


_only_text = (_tokenizer(eos_token=_TEXT), edit_json("config.json", eos_token_id=0))
ENDS = (
    _ends("generation_config.json lists two ends", (), _TEXT, _settings(eos_token_id=[2, 0])),
    _ends("generation_config.json names another end", (), _TEXT, _settings(eos_token_id=0)),
    _ends("config.json lists two ends", (), _TEXT, edit_json("config.json", eos_token_id=[2, 0])),
    _ends(
        "the tokenizer alone knows the end",
        (_END,),
        _END,
        edit_json("config.json", eos_token_id=REMOVED),
        families=EVERY,
    ),
    _ends("the template ends a turn, the config a text", (_TEXT, _END), _END, *_only_text),
    Situation(
        "the end of a turn is not flagged special",
        Answer(ends=(_TEXT, _END)),
        (on_folder(*_only_text),),
        vocabulary=partial(byte_level, special=(_TEXT,), plain=(_START, _END)),
        chain=says("O", "K", _END, "u", "s", _TEXT),
    ),
    Situation(
        "GGUF: eot_token_id",
        Answer(ends=(_TEXT, _END)),
        (
            on_folder(_tokenizer(eos_token=_TEXT)),
            as_gguf({"tokenizer.ggml.eot_token_id": 2}),
        ),
        families=("llama", "mistral", "qwen2"),
        chain=says("O", "K", _END, "u", "s", _TEXT),
    ),
)
NAMED_ENDS = tuple(
    # llama.cpp ends an answer at these wherever the vocabulary has them (llama-vocab.cpp).
    Situation(
        f"GGUF: {end} ends an answer that no key ends",
        Answer(ends=(_END, end)),
        (as_gguf(),),
        families=("qwen2",),
        vocabulary=partial(byte_level, special=tuple(dict.fromkeys((*SPECIAL, end)))),
        chain=says("O", "K", end, "u", "s", _END),
    )
    for end in (_TEXT, "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
)

_PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)
_LISTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + _PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHAT_TEMPLATE
)
_OTHER = CHAT_TEMPLATE.replace("\n{{", "\n> {{")
_named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": _OTHER}]
_bos = "{{ bos_token }}" + CHAT_TEMPLATE


def _templates(name: str, same: Any, *edits: Any, **more: Any) -> Situation:
    return Situation(name, same, (on_folder(*edits),), chain=says("O", "K", _END), **more)


def _in_a_folder(folder: Path) -> None:
    """Named templates as files of their own, as transformers 5 saves them."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "chat_template.jinja").write_text(_OTHER)


TEMPLATES = (
    _templates("a template", Prompt(), families=EVERY),
    _templates("a template with a system message", Prompt(system="Be brief.")),
    _templates(
        "a template that begins with <s>", Prompt(), _tokenizer(chat_template=_bos, bos_token=_TEXT)
    ),
    Situation(
        "a template that begins with <s>, as the tokenizer does",
        Prompt(),
        (on_folder(_tokenizer(chat_template=_bos)),),
        vocabulary=sentencepiece,
        chain=path("<0x0A>", "O", "K", "</s>"),
    ),
    _templates("contents as lists of parts", Prompt(parts=True), _tokenizer(chat_template=_LISTS)),
    _templates(
        "contents as lists of parts, with a system message",
        Prompt(parts=True, system="Be brief."),
        _tokenizer(chat_template=_LISTS),
    ),
    _templates("named templates", Prompt(), _tokenizer(chat_template=_named)),
    _templates(
        "chat_template.jinja beside another in the config",
        Prompt(),
        write_file("chat_template.jinja", _OTHER),
    ),
    _templates(
        "chat_template.jinja alone",
        Prompt(),
        _tokenizer(chat_template=REMOVED),
        write_file("chat_template.jinja", _OTHER),
    ),
    _templates("named templates as files", Prompt(), _in_a_folder),
    _templates(
        "chat_template.json",
        Prompt(),
        _tokenizer(chat_template=_OTHER),
        write_file("chat_template.json", json.dumps({"chat_template": _OTHER})),
    ),
    _templates(
        "a template that refuses system messages",
        NoAnswer(("system",), ("--system", "Be brief.")),
        _tokenizer(chat_template=_NO_SYSTEM),
    ),
    _templates(
        "a template that loses the words",
        NoAnswer(("template",)),
        _tokenizer(chat_template="{% for m in messages %}{{ m['role'] }}:\n{% endfor %}"),
    ),
    _templates(
        "a template that renders nothing",
        NoAnswer(("template",)),
        _tokenizer(chat_template="{% if false %}{{ messages }}{% endif %}"),
    ),
    _templates(
        "named templates without a default",
        NoAnswer(("tool_use",)),
        _tokenizer(chat_template=_named[:1]),
    ),
    Situation(
        "GGUF: a template",
        Prompt(),
        (as_gguf(),),
        families=IN_GGUF,
        chain=says("O", "K", _END),
    ),
)

# Each token is nearly as likely to come again as to be followed by the next.
_REPEATS = {
    "Ċ": {"a": 2.0},
    "a": {"a": 2.0, "b": 1.9},
    "b": {"b": 2.0, "c": 1.9},
    "c": {"c": 2.0, _END: 1.9},
}
_MOVES_ON = {"Ċ": {"a": 2.0}, "a": {"b": 2.0, "a": 1.9}, "b": {"c": 2.0, "b": 1.9}}
_CLOSE = {
    "Ċ": {"a": 2.0, "b": 1.99},
    "a": {"b": 2.0, "c": 1.99},
    "b": {"c": 2.0, "a": 1.99},
    "c": {"a": 2.0, "b": 1.99},
}


def _greedy(name: str, same: Answer, chain: Any, **settings: Any) -> Situation:
    own = {"eos_token_id": 2, **settings}
    return Situation(
        name, same, (on_folder(_settings(**own)),), families=("llama", "qwen2"), chain=chain
    )


def _chances(name: str, meaning: Mapping[str, Any] | None = None, **settings: Any) -> Situation:
    return Situation(
        name, Chances(meaning or {}), (on_folder(_settings(do_sample=True, **settings)),)
    )


SETTINGS = (
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
    _chances("a top-k of transformers' own", temperature=0.9),
    _chances("top-p alone", top_p=0.5, top_k=0),
    _chances("a tiny top-p", temperature=1.0, top_p=1e-06, top_k=0),
)

ROWS = (*ENDS, *NAMED_ENDS, *TEMPLATES, *SETTINGS)
