"""A model's chat template: messages to the text that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

from teal_cli.bounded import Bounded, Exceeded
from teal_cli.errors import TealError, UsageError
from teal_cli.model.tokenizer import MOST_CHARACTERS
from teal_cli.printable import encodable

# Keys: role (system, user or assistant), content, and reasoning_content where an answer was
# thought about: the names under which templates look for them.
Message = dict[str, str]

# Begin and end of thinking, as Qwen 3, DeepSeek-R1 and their like write it, and as Magistral does.
THINKING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# What templates call their switch: Qwen 3 and SmolLM 3, then Granite and DeepSeek-V3.1.
_SWITCHES = ("enable_thinking", "thinking")
_DAMAGED = "The template in this checkpoint is damaged, or made for another use."
# Templates for other ends than talking, where a model has several.
_OTHER_ENDS = ("tool_use", "rag")
# Stand for messages where it is seen what a template makes of them; no template changes more of
# a plain word than its case.
_SYSTEM_WORD, *_TURN_WORDS = ("tealsystem", "tealfirst", "tealsecond", "teallast")


class ChatTemplate:
    """Renders conversations as transformers does, in the form that the template wants.

    Some templates take a message's content as a list of parts, each with type and text. What a
    template makes of words is seen once for each shape of a conversation.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        """Choose the template.

        Args:
            tokenizer: a transformers tokenizer that has one or several.
            name: which of several; None is the one named default, or the only one for talking.

        Raises:
            UsageError: there is none of this name, or none is the one for talking.
        """
        self._tokenizer = tokenizer
        self._source = _chosen(tokenizer.chat_template, name)
        self._parts: dict[tuple[str, ...], bool] = {}  # by the roles of a shape
        self._rendered = Bounded(partial(_rendered, tokenizer), what="the model's chat template")

    @classmethod
    def of(cls, tokenizer: Any, name: str | None = None) -> ChatTemplate | None:
        """The template to talk with; None is a base model's tokenizer.

        Raises:
            UsageError: there is none of this name, or none is the one for talking.
        """
        if getattr(tokenizer, "chat_template", None):
            return cls(tokenizer, name)
        if name is not None:
            raise UsageError("this model has no chat template")
        return None

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: a system message or none, then turns.
            think: what to set the model's switch for thinking to; None leaves it alone.
            add_generation_prompt: end with the beginning of an answer.

        Raises:
            UsageError: the template leaves out the system message.
            TealError: it leaves out what the user says, or fails.
        """
        roles = _shape(messages)
        try:
            if roles not in self._parts:
                self._parts[roles] = self._wants_parts(roles)
            switches = {} if think is None else dict.fromkeys(self.switches, think)
            return self._apply(
                messages,
                self._parts[roles],
                add_generation_prompt=add_generation_prompt,
                **switches,
            )
        except TealError:
            raise
        except Exception as error:  # whatever the foreign code of a template raises
            line = getattr(error, "lineno", None)  # a syntax error's
            where = "" if line is None else f" (line {line} of the template)"
            raise TealError(
                f"the model's chat template does not accept this conversation: {error}{where}",
                hint="Some models take no system message." if roles[0] == "system" else None,
            ) from None

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """The template's variables that turn thinking on and off; empty without a switch."""
        turn = [{"role": "user", "content": _TURN_WORDS[-1]}]

        def rendered(name: str, value: bool) -> str | None:
            try:
                parts = self._wants_parts(("user",))
                return self._apply(turn, parts, add_generation_prompt=True, **{name: value})
            except Exceeded:
                raise
            except Exception:  # a template that fails is explained when it is rendered for good
                return None

        return tuple(name for name in _SWITCHES if rendered(name, True) != rendered(name, False))

    @property
    def knows_thinking(self) -> bool:
        """Whether answers of the model may begin with thinking."""
        return bool(self.switches) or any(end in self._source for _, end in THINKING_MARKS)

    def _wants_parts(self, roles: tuple[str, ...]) -> bool:
        """Whether content must be a list of parts for every message's words to be rendered."""
        words = [*([_SYSTEM_WORD] if roles[0] == "system" else ()), *_TURN_WORDS]
        words = [*words[: len(roles) - 1], _TURN_WORDS[-1]]
        probe = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
        kept: dict[bool, set[str]] = {}
        for parts in (False, True):
            try:
                text = self._apply(probe, parts, add_generation_prompt=True).lower()
            except Exceeded:
                raise
            except Exception:
                continue
            kept[parts] = {word for word in words if word in text}
        if not kept:
            return False  # to fail with its own words
        best = max(kept, key=lambda parts: (len(kept[parts]), not parts))
        if words[-1] not in kept[best]:
            raise TealError(
                "the model's chat template leaves out what the user says, so the model would "
                "answer something else",
                hint=_DAMAGED,
            )
        if roles[0] == "system" and _SYSTEM_WORD not in kept[best]:
            raise UsageError(
                "this model's chat template takes no system message: it would be left out",
                hint="Leave it out, or say the same in the prompt.",
            )
        return best

    def _apply(self, messages: Sequence[Message], parts: bool, **variables: Any) -> str:
        given: list[dict[str, Any]] = [dict(message) for message in messages]
        if parts:
            for message in given:
                message["content"] = [{"type": "text", "text": message["content"]}]
        text: str = self._rendered(self._source, given, variables)
        return text


def _rendered(
    tokenizer: Any, source: str, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    """What transformers makes of a template, with "?" for half surrogate pairs."""
    text = str(
        tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **variables)
    )
    if len(text) > MOST_CHARACTERS:
        raise TealError(f"the model's chat template makes a text of {len(text):,} characters of it")
    return encodable(text)


def check_think(template: ChatTemplate | None, think: bool | None) -> None:
    """Refuse a choice about thinking where there is none.

    Raises:
        UsageError: the model has no switch.
    """
    if think is not None and not (template and template.switches):
        thinks = template is not None and template.knows_thinking
        raise UsageError(
            "this model has no switch for thinking",
            hint="It thinks where it likes to; --think-tokens bounds that." if thinks else None,
        )


def _chosen(templates: Any, name: str | None) -> str:
    """The template to talk with, of what a file gives as such."""
    named = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(template, str) for template in named):
        raise TealError("the model's chat template is not a text", hint=_DAMAGED)
    if isinstance(templates, str):
        if name is not None:
            raise UsageError("this model has one chat template, without a name")
        return templates
    names = ", ".join(sorted(templates))
    if name is not None:
        if name not in templates:
            raise UsageError(f"this model has no chat template {name!r}", hint=f"It has: {names}.")
        return str(templates[name])
    if "default" in templates:
        return str(templates["default"])
    talking = [own for own in templates if own not in _OTHER_ENDS] or list(templates)
    if len(talking) > 1:
        raise UsageError(
            f"this model has several chat templates, and none is its default: {names}",
            hint="Choose one with --template NAME.",
        )
    return str(templates[talking[0]])


def _shape(messages: Sequence[Message]) -> tuple[str, ...]:
    """The roles of a short conversation like this one: its system message and last three turns."""
    roles = [message["role"] for message in messages]
    system = roles[:1] if roles[0] == "system" else []
    return (*system, *roles[len(system) :][-3:])
