"""An answer as typed text: thinking apart from what is said, cut off before a stop text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from teal_cli.inference.chat_template import THINKING_MARKS
from teal_cli.inference.detokenizer import Detokenizer
from teal_cli.inference.generate import Finish, FinishReason, Stats, Token, generate
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session
from teal_cli.progress import Reporter

# After this a model that was still thinking begins its answer, as after thinking that it ended.
_CLOSED = "\n{end}\n\n"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of an answer, or of the thinking before it."""

    text: str
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Where an answer ends.

    `stop_token_ids` and `stop_texts` are not part of it; stop texts are not looked for in
    thinking. After `max_thinking_tokens` the end of thinking is written for the model, and the
    answer has all of its `max_new_tokens` still.
    """

    max_new_tokens: int
    max_thinking_tokens: int
    stop_token_ids: Collection[int] = ()
    stop_texts: Sequence[str] = ()


def generate_text(
    session: Session,
    tokenizer: Any,
    prompt: Sequence[int],
    sampler: Sampler,
    limits: Limits,
    *,
    chat_prompt: str | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> Iterator[Token | Text | Finish]:
    """Answer a prompt: tokens, and the text that they make.

    Args:
        session: what decodes; afterwards it holds the prompt and the answer, and what a stop
            text cut off.
        tokenizer: a transformers tokenizer.
        prompt: the whole sequence so far, at least one token.
        sampler: chooses each token.
        limits: where the answer ends.
        chat_prompt: the prompt's text, where it comes from a chat template: an answer then begins
            with its first word, perhaps after thinking. None: the prompt is continued.
        interrupted: asked between tokens, as `generate` does.
        reporter: follows the reading of a long prompt.

    Yields:
        Each `Token`, the `Text` that it completes, and last one `Finish`.

    Raises:
        UsageError: the prompt leaves no room in the context.
    """
    text = _AnswerText(tokenizer, limits.stop_texts, chat_prompt)
    left = {False: limits.max_new_tokens, True: limits.max_thinking_tokens}  # of answer, thinking
    tokens, stats = [*prompt], None
    ending: FinishReason | None = None

    def is_over() -> bool:
        return ending is not None or interrupted()

    while True:
        steps = generate(
            session,
            tuple(tokens),
            sampler,
            max_new_tokens=session.max_length,  # what is left of each is counted here
            stop_token_ids=limits.stop_token_ids,
            interrupted=is_over,
            reporter=reporter,
        )
        for step in steps:
            if isinstance(step, Finish):
                finish = step
                break
            thought = text.is_thinking
            tokens.append(step.id)
            yield step
            yield from text.add(step.id)
            left[thought or text.is_thinking] -= 1
            if text.is_thinking and not thought:  # the mark was no part of the answer
                left[False] = limits.max_new_tokens
            if text.is_cut:
                ending = "stop"
            elif left[text.is_thinking] <= 0:
                ending = "length"
        stats = finish.stats if stats is None else _together(stats, finish.stats)
        reason = ending or finish.reason
        if not (text.is_thinking and reason == "length"):
            break
        closed = tokenizer.encode(text.closing, add_special_tokens=False)
        if len(tokens) + len(closed) >= session.max_length:
            reason = "context"
            break
        tokens += closed
        ending = None
        yield from text.close()
    yield from text.finish()
    yield Finish("stop" if text.is_cut else reason, stats)


class _AnswerText:
    """The text of the tokens of one answer."""

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str], chat_prompt: str | None) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, continues=chat_prompt is None)
        self._thinking = None if chat_prompt is None else _Thinking(chat_prompt)
        self._stops = _Stops(stop_texts)
        # Marks of thinking can be special tokens, which are no text anywhere else.
        self._marks = {
            tokenizer.backend_tokenizer.token_to_id(mark): mark
            for marks in THINKING_MARKS
            for mark in marks
        }

    @property
    def is_thinking(self) -> bool:
        """Whether the model is thinking still."""
        return self._thinking is not None and self._thinking.end is not None

    @property
    def is_cut(self) -> bool:
        """Whether a stop text has come."""
        return self._stops.found

    @property
    def closing(self) -> str:
        """What ends the thinking."""
        assert self._thinking is not None
        return _CLOSED.format(end=self._thinking.end)

    def add(self, token: int) -> Iterator[Text]:
        """What may be shown since the last token."""
        if token in self._marks and self._thinking is not None and not self._thinking.is_over:
            yield from self._sorted(self._detokenizer.finish() + self._marks[token])
            self._detokenizer = Detokenizer(self._tokenizer)
        else:
            yield from self._sorted(self._detokenizer.add(token))

    def close(self) -> Iterator[Text]:
        """End the thinking, for a model that did not."""
        yield from self._sorted(self._detokenizer.finish() + self.closing)
        self._detokenizer = Detokenizer(self._tokenizer)

    def finish(self) -> Iterator[Text]:
        """What was held back."""
        yield from self._sorted(self._detokenizer.finish())
        if self._thinking is not None:
            yield from self._cut(self._thinking.finish())
        if rest := self._stops.finish():
            yield Text(rest)

    def _sorted(self, text: str) -> Iterator[Text]:
        pieces = [Text(text)] if self._thinking is None else self._thinking.add(text)
        for piece in pieces:
            yield from self._cut(piece)

    def _cut(self, piece: Text) -> Iterator[Text]:
        if not piece.thinking:
            piece = Text(self._stops.add(piece.text))
        if piece.text:
            yield piece


class _Thinking:
    """Tells thinking at the beginning of an answer from the answer; neither begins with space."""

    def __init__(self, prompt: str) -> None:
        prompt = prompt.rstrip()
        self.end = next((end for start, end in THINKING_MARKS if prompt.endswith(start)), None)
        self._begun = self.end is not None  # whether it is known if there is thinking
        self._lead = True  # whether only space has come yet
        self._held = ""  # may be the start of a mark

    @property
    def is_over(self) -> bool:
        """Whether the answer has begun."""
        return self._begun and self.end is None

    def add(self, text: str) -> Iterator[Text]:
        text = self._held + text
        self._held = ""
        if not self._begun:
            text = text.lstrip()
            if any(start.startswith(text) and start != text for start, _ in THINKING_MARKS):
                self._held = text
                return
            self._begun = True
            for start, end in THINKING_MARKS:
                if text.startswith(start):
                    self.end, text = end, text.removeprefix(start)
        if self.end is not None:
            thought, found, rest = text.partition(self.end)
            if not found:
                shown = text[: len(text) - _beginning(text, self.end)].rstrip()
                self._held = text[len(shown) :]
                yield self._led(shown)
                return
            yield self._led(thought.rstrip())
            self.end, self._lead, text = None, True, rest
        yield self._led(text)

    def finish(self) -> Text:
        text, self._held = self._held, ""
        return self._led(text)

    def _led(self, text: str) -> Text:
        if self._lead:
            text = text.lstrip()
            self._lead = not text
        return Text(text, thinking=self.end is not None)


class _Stops:
    """Cuts a text right before the stop text that is complete first."""

    def __init__(self, stop_texts: Sequence[str]) -> None:
        self.found = False
        self._stop_texts = stop_texts
        self._held = ""  # may be the start of a stop text

    def add(self, text: str) -> str:
        if self.found:
            return ""
        text = self._held + text
        starts = [(text.find(stop), stop) for stop in self._stop_texts]
        if found := [(start + len(stop), start) for start, stop in starts if start >= 0]:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_beginning(text, stop) for stop in self._stop_texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


def _beginning(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(mark[:n])), 0)


def _together(first: Stats, second: Stats) -> Stats:
    """The cost of an answer that was made in two runs."""
    shares = [(s.realised_sparsity, s.new_tokens) for s in (first, second)]
    known = [(share, n) for share, n in shares if share is not None]
    weight = sum(n for _, n in known)
    return Stats(
        prompt_tokens=first.prompt_tokens,
        reused_tokens=first.reused_tokens,
        new_tokens=first.new_tokens + second.new_tokens,
        time_to_first_token_s=first.time_to_first_token_s,
        decode_s=first.decode_s + second.time_to_first_token_s + second.decode_s,
        realised_sparsity=sum(s * n for s, n in known) / weight if weight else None,
        draft=first.draft and second.draft and first.draft + second.draft,
    )
