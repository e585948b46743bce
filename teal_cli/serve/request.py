"""A request's body as what is asked for; what is not understood is refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from teal_cli.errors import UsageError
from teal_cli.inference.chat_template import Message
from teal_cli.inference.sampling import Sampling
from teal_cli.printable import encodable
from teal_cli.serve.refusal import Refusal
from teal_cli.sparsity.setting import check_target
from teal_cli.suggestions import did_you_mean, quoted

MOST_LOGPROBS = 20
_MOST_STOPS = 16
_LARGEST = 2**63
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# OpenAI's name of a field of `Sampling`, and whether it is a whole number.
_SAMPLING = {
    "temperature": False,
    "top_p": False,
    "top_k": True,
    "min_p": False,
    "presence_penalty": False,
    "frequency_penalty": False,
    "repetition_penalty": False,
    "seed": True,
}
# What is not there, with the values that ask for nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
# What changes no token.
_PASSED_OVER = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "verbosity",
)
_COMMON = ("model", "stream", "stream_options", "stop", "max_tokens", "sparsity", "draft", "user")
_FIELDS = {*_SAMPLING, *_ONLY, *_PASSED_OVER, *_COMMON, "logprobs", "response_format"}
_CHAT_FIELDS = {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
# Where OpenAI's completions end if nobody says.
_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; what is None is the server's to choose.

    `messages` are a chat's, `prompt` is a text or its tokens that is continued.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of `Sampling`
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None  # of the likeliest tokens, beside the chosen one's
    stream: bool = False
    include_usage: bool = False
    sparsity: float | None = None
    draft: str | None = None  # what guesses, as --draft has it, or "none"
    think: bool | None = None
    user: str | None = None


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refusal: it is something else.
    """
    try:
        content = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise Refusal("the body is no JSON object")
    return content


def chat_request(body: Mapping[str, Any]) -> Asked:
    """What a body for /v1/chat/completions asks for.

    Raises:
        Refusal: it is not understood, or asks for what is not there.
    """
    fields = _Fields(body, _FIELDS | _CHAT_FIELDS)
    longest = fields.whole("max_completion_tokens", 1) or fields.whole("max_tokens", 1)
    likeliest = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if not fields.flag("logprobs"):
        if likeliest is not None:
            raise Refusal("top_logprobs goes with logprobs true", param="top_logprobs")
    else:
        likeliest = likeliest or 0
    return Asked(
        messages=_messages(fields.given("messages")),
        max_tokens=longest,
        logprobs=likeliest,
        think=_think(fields),
        **_common(fields),
    )


def completion_request(body: Mapping[str, Any]) -> Asked:
    """What a body for /v1/completions asks for.

    Raises:
        Refusal: it is not understood, or asks for what is not there.
    """
    fields = _Fields(body, _FIELDS | {"prompt"})
    longest = fields.whole("max_tokens", 1)
    return Asked(
        prompt=_prompt(fields.given("prompt")),
        max_tokens=_COMPLETION_TOKENS if longest is None else longest,
        logprobs=fields.whole("logprobs", 0, MOST_LOGPROBS),
        **_common(fields),
    )


class _Fields:
    """The fields of a body, checked as they are taken out; null is as if they were not there."""

    def __init__(self, body: Mapping[str, Any], known: Collection[str]) -> None:
        for name in body:
            if name not in known:
                hint = did_you_mean(name, sorted(known)).strip()
                message = f"there is no parameter {quoted(name)}. {hint}".rstrip()
                raise Refusal(message, param=name[:64], code="unknown_parameter")
        self._body = {name: value for name, value in body.items() if value is not None}
        for name, values in _ONLY.items():
            value = self._body.get(name)
            if name in self._body and not any(_same(value, one) for one in values):
                raise Refusal(
                    f"{name} is not supported" + (" with this value" if values else ""),
                    param=name,
                    code="unsupported_parameter",
                )

    def given(self, name: str) -> Any:
        """A field that must be there."""
        if name not in self._body:
            raise Refusal(f"{name} is missing", param=name, code="missing_required_parameter")
        return self._body[name]

    def get(self, name: str, kind: type, noun: str) -> Any:
        """A field of a type; None where it is not there."""
        value = self._body.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise _wrong(name, noun)
        return value

    def flag(self, name: str) -> bool:
        value = self._body.get(name, False)
        if not isinstance(value, bool):
            raise _wrong(name, "true or false")
        return value

    def whole(self, name: str, least: int, most: int = _LARGEST) -> int | None:
        value = self.get(name, int, "a whole number")
        if value is not None and not least <= value <= most:
            bound = f"at least {least}" if most == _LARGEST else f"from {least} to {most}"
            raise Refusal(f"{name} must be {bound}", param=name, code="invalid_value")
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        value = self.get(name, (int, float), "a number")  # type: ignore[arg-type]
        try:
            return None if value is None else float(value)
        except OverflowError:
            raise Refusal(f"{name} is too large", param=name, code="invalid_value") from None


def _common(fields: _Fields) -> dict[str, Any]:
    stream = fields.flag("stream")
    options = fields.get("stream_options", dict, "an object")
    if options is not None and not stream:
        raise Refusal("stream_options goes with stream true", param="stream_options")
    form = fields.get("response_format", dict, "an object")
    if form is not None and form.get("type") != "text":
        raise Refusal(
            "only response_format text is supported: answers are not held to a grammar",
            param="response_format",
            code="unsupported_value",
        )
    sparsity = fields.number("sparsity")
    if sparsity is not None:
        _checked("sparsity", lambda: check_target(sparsity))
    return {
        "model": fields.get("model", str, "a text") or fields.given("model"),
        "sampling": _sampling(fields),
        "stop": _stop(fields),
        "stream": stream,
        "include_usage": _Fields(options or {}, {"include_usage", "include_obfuscation"}).flag(
            "include_usage"
        ),
        "sparsity": sparsity,
        "draft": fields.get("draft", str, "a text"),
        "user": fields.get("user", str, "a text"),
    }


def _sampling(fields: _Fields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, is_whole in _SAMPLING.items():
        value = fields.whole(name, -_LARGEST) if is_whole else fields.number(name)
        if value is not None:
            _checked(name, lambda name=name, value=value: Sampling(**{name: value}))  # type: ignore[misc]
            found[name] = value
    return found


def _checked(name: str, check: Callable[[], object]) -> None:
    try:
        check()
    except UsageError as error:
        raise Refusal(error.message, param=name, code="invalid_value") from None


def _stop(fields: _Fields) -> tuple[str, ...]:
    given = fields.get("stop", (str, list), "a text or a list of texts")  # type: ignore[arg-type]
    texts = [given] if isinstance(given, str) else given or []
    if not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", "a text or a list of texts, none of them empty")
    if len(texts) > _MOST_STOPS:
        raise Refusal(f"stop takes at most {_MOST_STOPS} texts", param="stop", code="invalid_value")
    return tuple(texts)


def _think(fields: _Fields) -> bool | None:
    """What vLLM's way of setting a template's switch says."""
    switches = fields.get("chat_template_kwargs", dict, "an object") or {}
    given = _Fields(switches, {"enable_thinking", "thinking"})
    return given.flag(next(iter(switches))) if switches else None


def _messages(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list) or not given:
        raise _wrong("messages", "a list of messages, at least one")
    messages = tuple(_message(entry, f"messages[{at}]") for at, entry in enumerate(given))
    if all(message["role"] == "system" for message in messages):
        raise Refusal("messages must have a turn of the user", param="messages")
    return messages


def _message(entry: Any, at: str) -> Message:
    if not isinstance(entry, dict):
        raise _wrong(at, "an object")
    role = entry.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refusal(
            f"{at}.role must be system, developer, user or assistant",
            param=f"{at}.role",
            code="invalid_value",
        )
    if entry.get("tool_calls") or entry.get("function_call"):
        raise Refusal("calls of tools are not supported", param=at, code="unsupported_parameter")
    content = entry.get("content")
    if content is None and role == "assistant":
        content = ""
    message = {"role": _ROLES[role], "content": _content(content, f"{at}.content")}
    thought = entry.get("reasoning_content")
    if isinstance(thought, str) and thought and role == "assistant":
        message["reasoning_content"] = encodable(thought)
    return message


def _content(content: Any, at: str) -> str:
    """A message's text, of one text or a list of parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise Refusal(
                f"{at} may hold text only, not {quoted(kind)}", param=at, code="unsupported_value"
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise _wrong(at, "a text or a list of parts of text")
    return encodable("".join(part["text"] for part in parts))


def _prompt(given: Any) -> str | tuple[int, ...]:
    """One prompt: a text or tokens, perhaps in a list by itself."""
    if isinstance(given, list) and len(given) == 1 and not isinstance(given[0], int):
        given = given[0]
    if isinstance(given, str):
        return encodable(given)
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        return tuple(given)
    if isinstance(given, list) and len(given) > 1:
        raise Refusal("a request has one prompt", param="prompt", code="unsupported_value")
    raise _wrong("prompt", "a text or a list of tokens")


def _wrong(name: str, noun: str) -> Refusal:
    return Refusal(f"{name} must be {noun}", param=name, code="invalid_type")


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
