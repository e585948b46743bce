"""Answers in OpenAI's objects: whole, and as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from teal_cli.inference.generate import Finish, Token
from teal_cli.inference.text_stream import Text
from teal_cli.serve.model import Model, Prepared
from teal_cli.serve.token_names import token_bytes

_REASONS = {"stop": "stop", "length": "length", "context": "length", "interrupted": "length"}


@dataclass
class Answer:
    """An answer as it comes, in the shape that its request asked for."""

    model: Model
    prepared: Prepared
    created: int = field(default_factory=lambda: int(time.time()))
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self._is_chat = self.prepared.text is not None
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._said = ""
        self._thought = ""
        self._thinking_tokens = 0
        self._since: list[Token] = []  # tokens whose text has not come yet
        self._chosen: list[Token] = []  # those of the text that has

    def add(self, step: Token | Text | Finish) -> list[dict[str, Any]]:
        """The chunks that a step of the answer makes; `whole` knows of it too."""
        if isinstance(step, Token):
            self._since.append(step)
            return []
        if isinstance(step, Text):
            tokens, self._since = self._since, []
            if step.thinking:
                self._thought += step.text
                self._thinking_tokens += len(tokens)
                return [self._chunk({"reasoning_content": step.text})] if self._is_chat else []
            self._said += step.text
            self._chosen += tokens
            text = {"content": step.text} if self._is_chat else step.text
            return [self._chunk(text, tokens=tokens)]
        self.finish = step
        last = self._chunk({} if self._is_chat else "", reason=_REASONS[step.reason])
        if not self.prepared.asked.include_usage:
            return [last]
        return [last, {**self._head(streamed=True), "choices": [], "usage": self.usage()}]

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first word."""
        return [self._chunk({"role": "assistant", "content": ""})] if self._is_chat else []

    def whole(self) -> dict[str, Any]:
        """The object of the answer, once it has ended."""
        assert self.finish is not None
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": self._said, "refusal": None}
            if self._thought:
                choice["message"]["reasoning_content"] = self._thought.strip()
        else:
            choice["text"] = self._said
        choice["logprobs"] = self._logprobs(self._chosen, 0)
        choice["finish_reason"] = _REASONS[self.finish.reason]
        return {**self._head(streamed=False), "choices": [choice], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens; `sparsity` is ours: what the decoded ones skipped."""
        assert self.finish is not None
        stats = self.finish.stats
        details = {"reasoning_tokens": self._thinking_tokens}
        if stats.draft is not None:
            details["accepted_prediction_tokens"] = stats.draft.accepted
            details["rejected_prediction_tokens"] = stats.draft.guessed - stats.draft.accepted
        return {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.new_tokens,
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
            "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
            "completion_tokens_details": details,
            "sparsity": stats.realised_sparsity,
        }

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {
            "id": self._id,
            "object": f"{kind}.chunk" if streamed and self._is_chat else kind,
            "created": self.created,
            "model": self.prepared.asked.model,
            "system_fingerprint": f"teal-{self.model.fingerprint[:12]}",
        }

    def _chunk(
        self,
        delta: dict[str, str] | str,
        *,
        tokens: Sequence[Token] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta" if self._is_chat else "text": delta}
        before = len(self._said) - len(delta) if isinstance(delta, str) else 0
        choice["logprobs"] = self._logprobs(tokens, before)
        choice["finish_reason"] = reason
        chunk = {**self._head(streamed=True), "choices": [choice]}
        if self.prepared.asked.include_usage:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """OpenAI's object for the chances of tokens, in the older form for a completion."""
        if self.prepared.asked.logprobs is None or not tokens:
            return None
        if self._is_chat:
            return {"content": [*self._entries(tokens)], "refusal": None}
        entries = [*self._entries(tokens)]
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in reversed(entry["top_logprobs"])}
                for entry in entries
            ],
            "text_offset": offsets,
        }

    def _entries(self, tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
        for token in tokens:
            assert token.chances is not None
            yield {
                **self._entry(token.id, token.chances.logprob),
                "top_logprobs": [self._entry(*likely) for likely in token.chances.likeliest],
            }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = token_bytes(self.model.tokenizer, token)
        return {
            "token": _spelled(spelled),
            "logprob": max(logprob, -9999.0),  # JSON knows no infinity
            "bytes": [*spelled],
        }


def _spelled(token: bytes) -> str:
    """A token's bytes as text; a part of a character as \\xf0\\x9f, so that no two look alike."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token)
