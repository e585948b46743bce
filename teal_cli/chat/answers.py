"""Showing an answer as it comes, and what it took."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from teal_cli import console
from teal_cli.chat.state import Chat
from teal_cli.chat.waiting import Waiting
from teal_cli.inference.conversation import Dropped
from teal_cli.inference.generate import Finish, Stats
from teal_cli.inference.guesses import DraftCounts
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.text_stream import Text
from teal_cli.sparsity.setting import DENSE

# A second Ctrl-C this soon is the same wish; a later one breaks off whatever still runs.
_SAME_PRESS_S = 1.0
_SHOWN_WORDS = 6

_ENDINGS = {
    "length": "cut off by max-tokens",
    "context": "the context is full",
    "interrupted": "stopped",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said, and how it ended."""

    text: str
    finish: Finish
    thinking: str = ""


class _Writer(Protocol):
    def write(self, text: str) -> None:
        """Show a piece."""

    def close(self) -> None:
        """Show the rest, and end the line."""


class _PlainWriter:
    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def close(self) -> None:
        print(flush=True)


class _NoWriter:
    def write(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def answer(chat: Chat, prompt: str, *, again: bool = False) -> Answer:
    """Stream one answer to stdout and its cost to stderr; with `chat.compare`, a dense one too.

    With `chat.silent`, nothing is shown of it.
    """
    if not chat.compare or not chat.sparsity:
        return _answer(chat, prompt, again=again)
    return _compare(chat, prompt, again=again)


def _answer(chat: Chat, prompt: str, *, again: bool) -> Answer:
    conversation = chat.conversation
    was_nearly_full = conversation.nearly_full
    writer, said, thought, thinking = _writer(chat), "", "", False
    reporter = console.reporter()
    waiting = Waiting(reporter)
    wanted = reporter.animated and not chat.plain
    with _interrupt_flag() as interrupted, _silent_keys(), waiting.shown(wanted):
        steps = conversation.answer(
            prompt,
            max_new_tokens=chat.max_tokens,
            max_thinking_tokens=chat.think_tokens,
            again=again,
            interrupted=interrupted,
            reporter=waiting,
        )
        try:
            for step in steps:
                waiting.stop()
                if thinking and not (isinstance(step, Text) and step.thinking):
                    thinking = False
                    console.print_dim("")  # ends the last line of the thinking
                if isinstance(step, Text) and step.thinking:
                    thought += step.text
                    if not chat.silent:
                        thinking = True
                        console.print_dim(step.text, end="")
                elif isinstance(step, Text):
                    said += step.text
                    writer.write(step.text)
                elif isinstance(step, Dropped):
                    console.print_dim(_dropped(step.turns))
                else:
                    finish = step
        except BaseException:
            if said:
                writer.close()  # so that what reports it begins a line of its own
            elif thinking:
                console.print_dim("")
            raise
        if said or finish.stats.new_tokens:
            writer.close()
    chat.last = finish
    chat.totals.add(finish.stats)
    console.print_dim(_statistics(chat, finish))
    if conversation.nearly_full and not was_nearly_full and conversation.has_template:
        console.print_dim(_nearly_full(chat))
    return Answer(said, finish, thought.strip())


def _compare(chat: Chat, prompt: str, *, again: bool) -> Answer:
    """The same prompt with the same draws, dense and then sparse; the sparse answer stays."""
    conversation, setting = chat.conversation, chat.session.setting
    sampler = conversation.sampler
    alike = replace(sampler.sampling, seed=sampler.draw_seed())
    try:
        chat.session.use(DENSE)
        conversation.sampler = Sampler(alike)
        print(console.styled("dense", console.BOLD, sys.stdout))
        dense = _answer(chat, prompt, again=again)
        if dense.finish.reason == "interrupted":
            return dense
        chat.session.use(setting)
        conversation.sampler = Sampler(alike)
        print(console.styled(f"\nsparsity {chat.sparsity:g}", console.BOLD, sys.stdout))
        sparse = _answer(chat, prompt, again=True)
    finally:
        conversation.sampler = sampler
        chat.session.use(setting)
    if sparse.finish.reason != "interrupted":
        print(f"\n{_difference(dense, sparse)}", flush=True)
    return sparse


def _difference(dense: Answer, sparse: Answer) -> str:
    """Where two texts part, and how their speeds compare."""
    if dense.text == sparse.text:
        verdict = "both say the same"
    else:
        a, b = dense.text.split(), sparse.text.split()
        same = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        words = "1 word" if same == 1 else f"{same} words"
        verdict = f"they part after {words}: {_excerpt(a[same:])} when dense,"
        verdict += f"\n{_excerpt(b[same:])} when sparse"
    speeds = [answer.finish.stats.tokens_per_s for answer in (dense, sparse)]
    if speeds[0] and speeds[1]:
        ratio = f"{speeds[1] / speeds[0]:.2f} x"
        verdict += f"\ndense {speeds[0]:.1f} tokens/s, sparse {speeds[1]:.1f} tokens/s, {ratio}"
    return verdict


def _excerpt(words: list[str]) -> str:
    if not words:
        return "nothing more"
    more = " …" if len(words) > _SHOWN_WORDS else ""
    return f"“{' '.join(words[:_SHOWN_WORDS])}{more}”"


def document(chat: Chat, answer: Answer) -> dict[str, Any]:
    """An answer for a program: what was said, how it ended, what made it and how fast."""
    stats = answer.finish.stats
    sparsity = 0.0 if chat.session.drafting is not None else chat.sparsity
    return {
        "kind": "answer",
        "schema": 1,
        "model": chat.model,
        "weights": chat.weights,
        "device": str(chat.session.decoder.device),
        "backend": chat.session.backend,
        "sparsity": sparsity,
        "method": (chat.method or chat.profile().default_method) if sparsity else None,
        "recovered": chat.setting_in_force.vectors is not None,
        "realised_sparsity": stats.realised_sparsity,
        "draft": _draft(chat, stats),
        "sampling": asdict(chat.conversation.sampler.sampling),
        "answer": answer.text,
        "thinking": answer.thinking or None,
        "finish_reason": answer.finish.reason,
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "time_to_first_token_s": stats.time_to_first_token_s,
        "decode_s": stats.decode_s,
        "tokens_per_s": stats.tokens_per_s,
    }


def _draft(chat: Chat, stats: Stats) -> dict[str, Any] | None:
    """Who guessed, and how well."""
    if chat.session.drafting is None or stats.draft is None:
        return None
    return {
        "name": chat.session.drafting.name,
        "sparsity": chat.sparsity,
        **asdict(stats.draft),
        "acceptance": stats.draft.acceptance,
        "tokens_per_round": stats.draft.tokens_per_round,
    }


def _writer(chat: Chat) -> _Writer:
    if chat.silent:
        return _NoWriter()
    if chat.plain:
        return _PlainWriter()
    from rich.console import Console

    from teal_cli.chat.markdown import MarkdownWriter

    return MarkdownWriter(Console(highlight=False))


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a flag that is asked for; one that comes later interrupts as usual."""
    pressed_s: float | None = None

    def note(number: int, frame: object) -> None:
        nonlocal pressed_s
        if pressed_s is not None and time.monotonic() - pressed_s > _SAME_PRESS_S:
            raise KeyboardInterrupt
        pressed_s = pressed_s or time.monotonic()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed_s is not None
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Keep what is typed from being echoed into the answer; the next prompt shows it."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    settings = termios.tcgetattr(sys.stdin)
    silent = [*settings]
    silent[3] &= ~termios.ECHO  # the local modes
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)


def _statistics(chat: Chat, finish: Finish) -> str:
    stats = finish.stats
    if finish.reason == "interrupted" and not stats.new_tokens:
        return "stopped before the answer began; the prompt is forgotten"
    parts = [f"{stats.new_tokens} token{'' if stats.new_tokens == 1 else 's'}"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    parts.append(f"first token {stats.time_to_first_token_s:.2f} s")
    if stats.draft is not None:
        parts += ["dense", guesses(stats.draft)]
    elif not chat.sparsity:
        parts.append("dense")
    elif stats.realised_sparsity is None:
        parts.append(f"sparsity {chat.sparsity:.0%}")
    else:
        parts.append(f"sparsity {chat.sparsity:.0%}, realised {stats.realised_sparsity:.1%}")
    if finish.reason in _ENDINGS:
        parts.append(_ENDINGS[finish.reason])
    return " · ".join(parts)


def guesses(counts: DraftCounts) -> str:
    """What guessing brought, as in "82% of 40 guesses right, 3.3 tokens a round"."""
    if counts.acceptance is None or counts.tokens_per_round is None:
        return "no guesses"
    rate = f"{counts.tokens_per_round:.1f} tokens a round"
    return f"{counts.acceptance:.0%} of {counts.guessed} guesses right, {rate}"


def _dropped(turns: int) -> str:
    return (
        f"the context is full: the oldest {turns} turns are left out from here on"
        if turns > 1
        else "the context is full: the oldest turn is left out from here on"
    )


def _nearly_full(chat: Chat) -> str:
    used, length = chat.session.position, chat.session.max_length
    then = {
        "truncate": "the oldest turns will be left out (--overflow stop would take no more)",
        "stop": "soon it takes no more (--overflow truncate would leave out the oldest turns)",
    }[chat.conversation.overflow]
    return f"{used} of {length} tokens of context are used: {then}; /clear begins anew"
