"""What the model is asked, and where its answer ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from differential.answers import Answer, NoAnswer, Prompt
from differential.situations import EVERY, IN_GGUF, Situation, as_gguf, on_folder, path
from differential.vocabularies import SPECIAL, byte_level, sentencepiece
from model.edits import REMOVED, edit_json
from model.edits import write as write_file
from tiny import CHAT_TEMPLATE
from tokenizers import AddedToken, Tokenizer

_TEXT, _START, _END = SPECIAL
generation_config = partial(edit_json, "generation_config.json")
tokenizer_config = partial(edit_json, "tokenizer_config.json")


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


_only_text = (tokenizer_config(eos_token=_TEXT), edit_json("config.json", eos_token_id=0))
ENDS = (
    _ends(
        "generation_config.json lists two ends", (), _TEXT, generation_config(eos_token_id=[2, 0])
    ),
    _ends("generation_config.json names another end", (), _TEXT, generation_config(eos_token_id=0)),
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
        "GGUF: eom_token_id",
        Answer(ends=(_TEXT, _END)),
        (
            on_folder(tokenizer_config(eos_token=_TEXT)),
            as_gguf({"tokenizer.ggml.eom_token_id": 2}, template=True),
        ),
        chain=says("O", "K", _END, "u", "s", _TEXT),
    ),
    Situation(
        "GGUF: eot_token_id",
        Answer(ends=(_TEXT, _END)),
        (
            on_folder(tokenizer_config(eos_token=_TEXT)),
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
_no_default = [{"name": name, "template": _OTHER} for name in ("tool_use", "rag")]
_bos = "{{ bos_token }}" + CHAT_TEMPLATE


# As Mistral's: the system message stands before the last turn, wherever that is.
_SYSTEM_LAST = (
    "{% set first = messages[0] %}{% for m in messages %}{% if m['role'] == 'user' %}[U]"
    "{% if loop.last and first['role'] == 'system' %}{{ first['content'] }}: {% endif %}"
    "{{ m['content'] }}[/U]\n"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# As Llama 3.1's and Granite's: the date, tools that there are none of, loops that go on.
_DATED = (
    "{%- if tools is not none and tools %}{{ tools | tojson(indent=2) }}{% endif -%}"
    "{%- set ns = namespace(n=0) %}Today: {{ strftime_now('%d %b %Y, %A') }}\n"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m['content'] is none %}{% continue %}"
    "{% endif %}\n    {{ ns.n }} {{ m['content'] | trim }} {{ {'é': '<'} | tojson }}<|im_end|>\n"
    "    {% endfor %}\n{{ bos_token }}{{ eos_token }}\n"
)
# As Qwen 2.5's: where nobody gives a system message, the template has one.
_OWN_SYSTEM = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\nA helper.<|im_end|>\n{%- endif -%}"
    + CHAT_TEMPLATE
)
_STRIPS = CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>")


def _with_a_turn_that_strips() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|turn|>", rstrip=True, special=True)])
    return tokenizer


def _grown(folder: Path) -> None:
    """A token more than the model has rows for, as a fine-tune without a resized embedding has."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|new|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


_MARKED = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}"
)


def _limited(folder: Path) -> None:
    """A tokenizer.json that cuts texts off and fills them up, as some were saved after training."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))


def _templates(name: str, same: Any, *edits: Any, **more: Any) -> Situation:
    return Situation(name, same, (on_folder(*edits),), chain=says("O", "K", _END), **more)


def _in_a_folder(folder: Path) -> None:
    """Named templates as files of their own, as transformers 5 saves them."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (folder / "chat_template.jinja").write_text(_OTHER)


TEMPLATES = (
    _templates("a template", Prompt(), families=EVERY),
    Situation("what random weights answer", Answer(max_new_tokens=16), families=EVERY),
    _templates("a template with a system message", Prompt(system="Be brief.")),
    _templates(
        "a template that begins with <s>",
        Prompt(),
        tokenizer_config(chat_template=_bos, bos_token=_TEXT),
    ),
    Situation(
        "a template that begins with <s>, as the tokenizer does",
        Prompt(),
        (on_folder(tokenizer_config(chat_template=_bos)),),
        vocabulary=sentencepiece,
        chain=path("<0x0A>", "O", "K", "</s>"),
    ),
    _templates(
        "contents as lists of parts", Prompt(parts=True), tokenizer_config(chat_template=_LISTS)
    ),
    _templates(
        "contents as lists of parts, with a system message",
        Prompt(parts=True, system="Be brief."),
        tokenizer_config(chat_template=_LISTS),
    ),
    _templates("named templates", Prompt(), tokenizer_config(chat_template=_named)),
    _templates(
        "chat_template.jinja beside another in the config",
        Prompt(),
        write_file("chat_template.jinja", _OTHER),
    ),
    _templates(
        "chat_template.jinja alone",
        Prompt(),
        tokenizer_config(chat_template=REMOVED),
        write_file("chat_template.jinja", _OTHER),
    ),
    _templates(
        "a template that marks what the model said",
        Prompt(),
        tokenizer_config(chat_template=_MARKED),
    ),
    Situation(
        "a prompt longer than the tokenizer's own limit",
        Prompt(),
        (on_folder(_limited),),
        chain=says("O", "K", _END),
    ),
    _templates(
        "a system message before the last turn",
        Prompt(turns=("a", "b", "c"), system="Be brief."),
        tokenizer_config(chat_template=_SYSTEM_LAST),
    ),
    _templates("a date, tools and loops", Prompt(), tokenizer_config(chat_template=_DATED)),
    _templates(
        "a system message of the template's own",
        Prompt(),
        tokenizer_config(chat_template=_OWN_SYSTEM),
    ),
    _templates(
        "a system message in place of the template's own",
        Prompt(system="Be brief."),
        tokenizer_config(chat_template=_OWN_SYSTEM),
    ),
    _templates(
        "a template that never heard of the answer's beginning",
        Prompt(),
        tokenizer_config(chat_template=CHAT_TEMPLATE.replace("add_generation_prompt", "true")),
    ),
    Situation(
        "a token in the template that takes the spaces behind it",
        Prompt(turns=(" Hi", "\n\nAnd you?")),
        (on_folder(tokenizer_config(chat_template=_STRIPS)),),
        vocabulary=_with_a_turn_that_strips,
        chain=says("O", "K", _END),
    ),
    _templates("a token without a row, unused", Answer(ends=(_END,)), _grown),
    _templates(
        "a token without a row in the template",
        NoAnswer(("token", "embedding")),
        _grown,
        tokenizer_config(chat_template="<|new|>" + CHAT_TEMPLATE),
    ),
    Situation(
        "rows without a token",
        Answer(ends=(_END,)),
        chain=says("O", "K", _END),
        model={"vocab_size": 320, "hidden_size": 320},
    ),
    _templates("named templates as files", Prompt(), _in_a_folder),
    _templates(
        "chat_template.json",
        Prompt(),
        tokenizer_config(chat_template=_OTHER),
        write_file("chat_template.json", json.dumps({"chat_template": _OTHER})),
    ),
    _templates(
        "a template that refuses system messages",
        NoAnswer(("system",), ("--system", "Be brief.")),
        tokenizer_config(chat_template=_NO_SYSTEM),
    ),
    _templates(
        "a template that loses the words",
        NoAnswer(("template",)),
        tokenizer_config(chat_template="{% for m in messages %}{{ m['role'] }}:\n{% endfor %}"),
    ),
    _templates(
        "a template that renders nothing",
        NoAnswer(("template",)),
        tokenizer_config(chat_template="{% if false %}{{ messages }}{% endif %}"),
    ),
    _templates(
        "named templates without a default",
        NoAnswer(("tool_use", "rag")),
        tokenizer_config(chat_template=_no_default),
    ),
    Situation(
        "GGUF: a template",
        Prompt(),
        (as_gguf(),),
        families=IN_GGUF,
        chain=says("O", "K", _END),
    ),
)

ROWS = (*ENDS, *NAMED_ENDS, *TEMPLATES)
