"""What a chat template makes of a conversation, and what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.chat_template import ChatTemplate, check_think

USER = [{"role": "user", "content": "HELLO you"}]
TALK = [*USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye & so"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)
EACH = "{% for m in messages %}{{ m['role'] }}: BODY\n\n{% endfor %}"
QWEN3 = """\
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and m.reasoning_content is string and loop.last %}
        {%- set content = '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    tiny.write_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def template(tokenizer: Any, source: Any, name: str | None = None) -> ChatTemplate:
    tokenizer.chat_template = source
    found = ChatTemplate.of(tokenizer, name)
    assert found is not None
    return found


def theirs(tokenizer: Any, messages: Any, **options: Any) -> str:
    options = {"tokenize": False, "add_generation_prompt": True} | options
    return str(tokenizer.apply_chat_template(messages, **options))


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


@pytest.mark.parametrize(
    "body",
    [
        "{{ m['content'] }}",
        "{{ m.content | trim | upper | escape }}",
        "{{ m | tojson }}",
        "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
        "{% set ns = namespace(n=0) %}{% for w in m.content.split(' ') %}{% if loop.index > 9 %}"
        "{% break %}{% endif %}{% set ns.n = ns.n + 1 %}{{ w }}.{% endfor %}{{ ns.n }}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{{ strftime_now('%Y')[:2] }}{{ m.content }}",
    ],
    ids=["plain", "changed", "json", "both", "loops", "generation", "date"],
)
@pytest.mark.parametrize("messages", [USER, TALK, SYSTEM + TALK], ids=["one", "two", "system"])
def test_a_conversation_is_rendered_as_transformers_does(
    tokenizer: Any, body: str, messages: Any
) -> None:
    own = template(tokenizer, EACH.replace("BODY", body))
    assert own.render(messages) == theirs(tokenizer, messages)


@pytest.mark.parametrize(
    "source",
    [
        EACH.replace("BODY", PARTS),
        EACH.replace("BODY", "{{ m['content'][0]['text'] }}"),
        "{% if messages[0].content is string %}{{ raise_exception('a list, please') }}{% endif %}"
        + EACH.replace("BODY", PARTS),
        # What the user says in either form, the rest in parts only.
        EACH.replace(
            "BODY",
            "{% if m.content is string and m.role == 'user' %}{{ m.content }}{% else %}"
            + PARTS
            + "{% endif %}",
        ),
    ],
    ids=["parts", "first part", "refuses text", "mixed"],
)
def test_content_is_a_list_of_parts_where_the_template_wants_it(
    tokenizer: Any, source: str
) -> None:
    own = template(tokenizer, source)
    for messages in (TALK, SYSTEM + TALK):
        assert own.render(messages) == theirs(tokenizer, in_parts(messages))
        assert "Yes?" in own.render(messages)


@pytest.mark.parametrize(
    "source",
    ["x", "", "{% for m in messages %}{{ m.role }}{% endfor %}", "{{ messages[0].text }}"],
)
def test_a_template_that_loses_what_the_user_says_is_refused(tokenizer: Any, source: str) -> None:
    if not source:  # an empty template is none
        tokenizer.chat_template = source
        assert ChatTemplate.of(tokenizer) is None
        return
    with pytest.raises(TealError, match="leaves out what the user says"):
        template(tokenizer, source).render(USER)


def test_a_template_for_one_turn_is_refused_at_the_second(tokenizer: Any) -> None:
    own = template(tokenizer, "{{ messages[0].content }}")
    assert own.render(USER) == "HELLO you"
    with pytest.raises(TealError, match="leaves out what the user says"):
        own.render(TALK)


def test_a_system_message_that_is_left_out_is_said(tokenizer: Any) -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    own = template(tokenizer, source)
    assert own.render(USER) == "HELLO you"
    with pytest.raises(UsageError, match="takes no system message"):
        own.render(SYSTEM + USER)


def test_what_a_template_raises_is_passed_on_whole(tokenizer: Any) -> None:
    source = "{{ raise_exception('Roles must alternate:\nuser, then assistant') }}"
    with pytest.raises(TealError, match=r"Roles must alternate:\nuser, then assistant") as raised:
        template(tokenizer, source).render(USER)
    assert raised.value.hint is None
    with pytest.raises(TealError) as raised:
        template(tokenizer, source).render(SYSTEM + USER)
    assert "system message" in (raised.value.hint or "")
    with pytest.raises(TealError, match=r"\(line 2 of the template\)"):
        template(tokenizer, "x\n{% if %}").render(USER)


def test_several_templates(tokenizer: Any) -> None:
    def named(*names: str) -> dict[str, str]:
        return {name: name + ": {{ messages[-1].content }}" for name in names}

    assert template(tokenizer, named("rag", "default")).render(USER) == "default: HELLO you"
    assert template(tokenizer, named("rag", "default"), "rag").render(USER) == "rag: HELLO you"
    assert template(tokenizer, named("tool_use", "chat", "rag")).render(USER) == "chat: HELLO you"
    with pytest.raises(UsageError, match="none is its default: chatml, vicuna") as raised:
        template(tokenizer, named("vicuna", "chatml"))
    assert "--template" in (raised.value.hint or "")
    with pytest.raises(UsageError, match="no chat template 'x'") as raised:
        template(tokenizer, named("rag", "default"), "x")
    assert "default, rag" in (raised.value.hint or "")
    with pytest.raises(UsageError, match="without a name"):
        template(tokenizer, tiny.CHAT_TEMPLATE, "default")
    with pytest.raises(UsageError, match="has no chat template"):
        template(tokenizer, None, "default")
    with pytest.raises(TealError, match="not a text"):
        template(tokenizer, {"default": 3})


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_switch_for_thinking_is_found_and_set(tokenizer: Any, name: str) -> None:
    own = template(tokenizer, QWEN3.replace("enable_thinking", name))
    assert own.switches == (name,)
    assert own.knows_thinking
    for think in (True, False):
        assert own.render(USER, think=think) == theirs(tokenizer, USER, **{name: think})
    assert own.render(USER) == theirs(tokenizer, USER)
    check_think(own, False)


def test_a_switch_is_found_where_content_is_parts(tokenizer: Any) -> None:
    refuses = "{% if messages[0].content is string %}{{ raise_exception('a list') }}{% endif %}"
    switch = "{% if enable_thinking %}T{% endif %}"
    own = template(tokenizer, refuses + EACH.replace("BODY", PARTS) + switch)
    assert own.render(USER, think=True).endswith("T")


@pytest.mark.parametrize(
    ("source", "knows"),
    [
        (tiny.CHAT_TEMPLATE, False),
        (EACH.replace("BODY", "I am thinking: {{ m.content }}"), False),
        (EACH.replace("BODY", "{{ m.content.split('</think>')[-1] }}"), True),
    ],
)
def test_no_switch_is_made_up(tokenizer: Any, source: str, knows: bool) -> None:
    own = template(tokenizer, source)
    assert (own.switches, own.knows_thinking) == ((), knows)
    with pytest.raises(UsageError, match="no switch for thinking"):
        check_think(own, True)


def test_what_was_thought_is_given_to_the_template(tokenizer: Any) -> None:
    own = template(tokenizer, QWEN3)
    answer = {"role": "assistant", "content": "Yes?", "reasoning_content": "hm"}
    assert "<think>\nhm\n</think>\n\nYes?" in own.render([*USER, answer])
    assert "hm" not in own.render([*USER, answer, *USER])
