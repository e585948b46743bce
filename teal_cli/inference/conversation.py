"""A conversation: messages to tokens, an answer as a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from teal_cli.errors import UsageError
from teal_cli.inference.chat_template import ChatTemplate, Message, check_think
from teal_cli.inference.detokenizer import Printable
from teal_cli.inference.generate import Finish, Stats, Token
from teal_cli.inference.prompts import Prompts
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session
from teal_cli.inference.text_stream import Limits, Text, generate_text
from teal_cli.printable import encodable
from teal_cli.progress import Reporter

Overflow = Literal["truncate", "stop"]

# Turns that must go make room down to this share of the context, so that not every turn after
# them has to read what is left anew.
_KEPT_SHARE = 0.75
# The context counts as nearly full where a turn of this share of it would not fit any more.
_NEXT_TURN_SHARE = 0.125


@dataclass(frozen=True, slots=True)
class Dropped:
    """So many of the oldest turns are no longer shown to the model, to make room."""

    turns: int


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
        stop_texts: Sequence[str] = (),
        system: str | None = None,
        think: bool | None = None,
        template: ChatTemplate | None = None,
        overflow: Overflow = "truncate",
    ) -> None:
        """Start a conversation.

        Args:
            session: decodes; its tokens belong to the conversation from now on.
            tokenizer: a transformers tokenizer.
            sampler: chooses the tokens; may be replaced between turns.
            stop_token_ids: end an answer.
            stop_texts: end an answer too, which is cut off before them.
            system: a message that comes before the first turn.
            think: whether the model thinks before it answers; None is as its template has it.
            template: which of the tokenizer's templates to use, where not the one to talk with.
            overflow: once the context is full, leave out the oldest turns, or take no more.

        Raises:
            UsageError: a system message for a model without a chat template, or a choice about
                thinking for one without a switch.
        """
        self._template = template or ChatTemplate.of(tokenizer)
        self._prompts = None if self._template is None else Prompts(tokenizer, self._template)
        self.has_template = self._template is not None
        self.sampler = sampler
        self.overflow: Overflow = overflow
        self.last_prompt: str | None = None
        self.nearly_full = False  # whether the context may not hold the next turn
        self._session = session
        self._tokenizer = tokenizer
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stop_texts = tuple(stop_texts)
        self._system: str | None = None
        self._turns: list[Message] = []
        self._hidden = 0  # of _turns, no longer shown to the model
        self._think: bool | None = None
        self.set_system(system)
        self.set_think(think)

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
        self._system = None if text is None else encodable(text)

    @property
    def think(self) -> bool | None:
        """Whether the model is to think before it answers; None leaves that to its template."""
        return self._think

    def set_think(self, think: bool | None) -> None:
        """Turn thinking on or off, from the next turn on.

        Raises:
            UsageError: the model has no switch for it.
        """
        check_think(self._template, think)
        self._think = think

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
        max_thinking_tokens: int = 2048,
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
            max_thinking_tokens: where thinking is cut off, and the answer begins.
            again: this turn takes the last one's place.
            interrupted: asked all the time; the answer ends once it says True.
            reporter: follows the reading of a long prompt.

        Yields:
            Perhaps one `Dropped`, `Text` whenever there is more to show, then one `Finish`.

        Raises:
            UsageError: the turn does not fit into the context; it is forgotten.
        """
        prompt = encodable(prompt)
        turns = [*(self._turns[:-2] if again else self._turns), {"role": "user", "content": prompt}]
        hidden = min(self._hidden, len(turns) - 1)
        longest = max_new_tokens
        if self._template is not None and self._template.knows_thinking and self.think is not False:
            longest += max_thinking_tokens
        text, tokens, hidden = self._prompt(prompt, turns, hidden, longest)
        if hidden > self._hidden:
            yield Dropped(sum(turn["role"] == "user" for turn in turns[self._hidden : hidden]))
        said, thought, answered = "", "", []
        cleaned = {thinking: Printable() for thinking in (False, True)}
        steps = generate_text(
            self._session,
            self._tokenizer,
            tokens,
            self.sampler,
            Limits(max_new_tokens, max_thinking_tokens, self._stop_token_ids, self._stop_texts),
            chat_prompt=text if self.has_template else None,
            interrupted=interrupted,
            reporter=reporter,
        )
        for step in steps:
            if isinstance(step, Token):
                answered.append(step.id)
                continue
            if isinstance(step, Text):
                piece = Text(cleaned[step.thinking].add(step.text), step.thinking)
            else:
                piece = Text(cleaned[False].finish())
            if piece.thinking:
                thought += piece.text
            else:
                said += piece.text
            if piece.text:
                yield piece
            if isinstance(step, Finish):
                if answered or step.reason != "interrupted":
                    self.last_prompt = prompt
                    if self._prompts is not None:
                        self._turns = [*turns, _answer(said, thought)]
                        self._hidden = hidden
                        self._prompts.remember(text, said, tokens, answered)
                        self.nearly_full = self._is_nearly_full(step.stats, longest)
                yield step

    def _prompt(
        self, prompt: str, turns: list[Message], hidden: int, max_new_tokens: int
    ) -> tuple[str, list[int], int]:
        """The text and tokens that the model sees, and how many messages it does not see."""
        if self._template is None:
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
        assert self._prompts is not None
        return self._prompts.encode([*self._opening(), *turns], think=self._think)

    def _opening(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


def _answer(said: str, thought: str) -> Message:
    message = {"role": "assistant", "content": said}
    if thought := thought.strip():
        message["reasoning_content"] = thought
    return message
