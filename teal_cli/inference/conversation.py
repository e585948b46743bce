"""A conversation: messages to tokens, an answer as a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.defaults import special_token_ids
from teal_cli.inference.detokenizer import Detokenizer
from teal_cli.inference.generate import Finish, Stats, Token, generate
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session
from teal_cli.progress import Reporter

Message = dict[str, str]  # role: system, user or assistant; content
Overflow = Literal["truncate", "stop"]

# Tokens before an answer that tell the detokenizer whether its first word follows a space.
_CONTEXT_TOKENS = 4

# Turns that must go make room down to this share of the context, so that not every turn after
# them has to read what is left anew.
_KEPT_SHARE = 0.75
# The context counts as nearly full where a turn of this share of it would not fit any more.
_NEXT_TURN_SHARE = 0.125


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, ready to be shown."""

    text: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """So many of the oldest turns are no longer shown to the model, to make room."""

    turns: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A conversation up to an answer, as text and as the tokens that are in the cache."""

    text: str
    tokens: list[int]


class Conversation:
    """Turns of user and model, over one session whose cache is kept between turns.

    With a chat template the model sees the whole conversation, or as much as the context holds.
    Without one it is a base model: it continues each text that it is given, and remembers nothing.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        sampler: Sampler,
        *,
        stop_token_ids: Collection[int],
        system: str | None = None,
        overflow: Overflow = "truncate",
    ) -> None:
        """Start a conversation.

        Args:
            session: decodes; its tokens belong to the conversation from now on.
            tokenizer: a transformers tokenizer.
            sampler: chooses the tokens; may be replaced between turns.
            stop_token_ids: end an answer.
            system: a message that comes before the first turn.
            overflow: once the context is full, leave out the oldest turns, or take no more.

        Raises:
            UsageError: a system message for a model without a chat template.
        """
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.sampler = sampler
        self.overflow: Overflow = overflow
        self.last_prompt: str | None = None
        self.nearly_full = False  # whether the context may not hold the next turn
        self._session = session
        self._tokenizer = tokenizer
        self._stop_token_ids = frozenset(stop_token_ids)
        self._special = special_token_ids(tokenizer)
        self._system: str | None = None
        self._turns: list[Message] = []
        self._hidden = 0  # of _turns, no longer shown to the model
        self._seen: _Seen | None = None
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system message first if there is one."""
        return [*self._opening(), *self._turns]

    @property
    def system(self) -> str | None:
        """The message before the first turn."""
        return self._system

    def set_system(self, text: str | None) -> None:
        """Put another system message, or none, before what was said.

        Raises:
            UsageError: the model has no chat template.
        """
        if text is not None and not self.has_template:
            raise UsageError(
                "this model has no chat template, so it takes no system message",
                hint="Leave it out: a base model continues the text of the prompt.",
            )
        self._system = None if text is None else _encodable(text)

    def clear(self) -> None:
        """Forget every turn; the system message stays."""
        self.restore(self._opening())

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on from these messages, instead of what was said.

        Raises:
            UsageError: the model has no chat template.
        """
        system = [m["content"] for m in messages if m["role"] == "system"]
        self.set_system(system[0] if system else None)
        self._turns = [m for m in messages if m["role"] != "system"]
        self._hidden = 0
        self.nearly_full = False
        prompts = [m["content"] for m in self._turns if m["role"] == "user"]
        self.last_prompt = prompts[-1] if prompts else None

    def answer(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        again: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
        reporter: Reporter | None = None,
    ) -> Iterator[Text | Dropped | Finish]:
        """Answer one turn.

        What was said of an interrupted answer stays in the conversation. A turn that is
        interrupted before its answer begins is forgotten.

        Args:
            prompt: the user's turn, or the text to continue.
            max_new_tokens: where an answer is cut off.
            again: this turn takes the last one's place.
            interrupted: asked all the time; the answer ends once it says True.
            reporter: follows the reading of a long prompt.

        Yields:
            Perhaps one `Dropped`, `Text` whenever there is more to show, then one `Finish`.

        Raises:
            UsageError: the turn does not fit into the context; it is forgotten.
        """
        prompt = _encodable(prompt)
        turns = [*(self._turns[:-2] if again else self._turns), {"role": "user", "content": prompt}]
        hidden = min(self._hidden, len(turns) - 1)
        text, tokens, hidden = self._prompt(prompt, turns, hidden, max_new_tokens)
        if hidden > self._hidden:
            yield Dropped(sum(turn["role"] == "user" for turn in turns[self._hidden : hidden]))
        detokenizer = Detokenizer(self._tokenizer, tokens[-_CONTEXT_TOKENS:])
        said, answered = "", []
        steps = generate(
            self._session,
            tokens,
            self.sampler,
            max_new_tokens=max_new_tokens,
            stop_token_ids=self._stop_token_ids,
            interrupted=interrupted,
            reporter=reporter,
        )
        for step in steps:
            if isinstance(step, Token):
                answered.append(step.id)
                piece = detokenizer.add(step.id)
            else:
                piece = detokenizer.finish()
            if self.has_template and not said:
                piece = piece.lstrip()  # SentencePiece models begin every answer with a space
            said += piece
            if piece:
                yield Text(piece)
            if isinstance(step, Finish):
                if answered or step.reason != "interrupted":
                    self.last_prompt = prompt
                    if self.has_template:
                        self._turns = [*turns, {"role": "assistant", "content": said}]
                        self._hidden = hidden
                        self._remember(text + said, tokens, answered)
                        self.nearly_full = self._is_nearly_full(step.stats, max_new_tokens)
                yield step

    def _prompt(
        self, prompt: str, turns: list[Message], hidden: int, max_new_tokens: int
    ) -> tuple[str, list[int], int]:
        """The text and tokens that the model sees, and how many messages it does not see."""
        if not self.has_template:
            tokens = self._tokenizer.encode(prompt)
            if not tokens:
                raise UsageError("the prompt is empty")
            return prompt, tokens, hidden
        length = self._session.max_length
        text, tokens = self._encode(turns[hidden:])
        room = self._room(max_new_tokens)
        if self.overflow == "truncate" and len(tokens) > room:
            starts = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > hidden]
            for start in starts:
                hidden = start
                text, tokens = self._encode(turns[hidden:])
                if len(tokens) <= min(room, _KEPT_SHARE * length):
                    break
        if len(tokens) >= length and len(turns) > 1:
            raise UsageError(
                f"the conversation, {len(tokens)} tokens, leaves no room for an answer in a "
                f"context of {length}",
                hint="Begin anew with /clear, or choose a longer --context.",
            )
        return text, tokens, hidden

    def _room(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have, for an answer to fit behind it."""
        length = self._session.max_length
        return length - min(max_new_tokens, length // 2)

    def _is_nearly_full(self, stats: Stats, max_new_tokens: int) -> bool:
        """Whether another turn like the last, or one of some size, would not fit."""
        last = stats.prompt_tokens - stats.reused_tokens + stats.new_tokens
        following = max(last, int(_NEXT_TURN_SHARE * self._session.max_length))
        return self._session.position + following > self._room(max_new_tokens)

    def _encode(self, turns: list[Message]) -> tuple[str, list[int]]:
        """The text that the template makes, and its tokens: the cache's, as far as it has them."""
        try:
            text = self._tokenizer.apply_chat_template(
                [*self._opening(), *turns], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the foreign code of a template raises
            raise TealError(
                f"the model's chat template does not accept this conversation: {error}",
                hint="Some models take no system message.",
            ) from None
        # The template has written the special tokens, so the tokenizer must not add them again.
        if self._seen is not None and text.startswith(self._seen.text):
            rest = self._tokenizer.encode(text[len(self._seen.text) :], add_special_tokens=False)
            # Only a special token is sure to be a token of its own wherever the text is cut.
            if rest and rest[0] in self._special:
                return text, [*self._seen.tokens, *rest]
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    def _remember(self, text: str, prompt: list[int], answered: list[int]) -> None:
        """Keep the tokens of an answer: the same text can be split otherwise than it was said."""
        hidden_tokens = self._special.intersection(answered)
        self._seen = None if hidden_tokens else _Seen(text, [*prompt, *answered])

    def _opening(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


def _encodable(text: str) -> str:
    """The text with "?" for half surrogate pairs, which stand for bytes that were no UTF-8."""
    return text.encode("utf-8", "replace").decode()
