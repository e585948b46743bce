"""The decode loop: one stream of typed steps that chat and bench consume."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal

from teal_cli.errors import UsageError
from teal_cli.inference.guesses import DraftCounts
from teal_cli.inference.sampling import Chances, Sampler
from teal_cli.inference.session import Interrupted, Session, common_prefix
from teal_cli.progress import Reporter

FinishReason = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the answer, with its chances where the sampler notes them."""

    id: int
    chances: Chances | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    """What an answer cost."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache
    new_tokens: int
    time_to_first_token_s: float  # or to the end, when none came
    decode_s: float  # from the first token to the last
    realised_sparsity: float | None  # None when dense, or when a single token was made
    draft: DraftCounts | None = None  # None where nothing guesses tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens a second, the first token left out: it is prefill's."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer, always the last step."""

    reason: FinishReason
    stats: Stats


def generate(
    session: Session,
    prompt_tokens: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
    interrupted: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> Iterator[Token | Finish]:
    """Answer a prompt, token by token.

    The part of the prompt that the session has seen already is not computed again. Where the
    session drafts, its guesses are decided on one by one, and none is left of an answer that ends.

    Args:
        session: what decodes; afterwards it holds the prompt and the answer.
        prompt_tokens: the whole sequence so far, at least one token.
        sampler: chooses each token.
        max_new_tokens: at least 1.
        stop_token_ids: end the answer, and are not part of it.
        interrupted: asked between tokens, and between the layers that read the prompt; the
            answer ends where it is once it says True.
        reporter: follows the reading of a long prompt.

    Yields:
        A `Token` for each token of the answer, then one `Finish`.

    Raises:
        UsageError: the prompt leaves no room in the context, or a sparse session drafts.
        TealError: the logits are not finite.
    """
    drafting = session.drafting
    if drafting is not None and session.setting.thresholds is not None:
        raise UsageError(
            "a model that checks guesses has to be dense: the rows that several tokens need"
            " together are nearly all"
        )
    if len(prompt_tokens) >= session.max_length:
        raise UsageError(
            f"{len(prompt_tokens)} tokens of text leave no room for an answer in a context of "
            f"{session.max_length}",
            hint="Shorten the text, or choose a longer context.",
        )
    started = time.perf_counter()
    reused = common_prefix(session.tokens, list(prompt_tokens[:-1]))
    session.rewind(reused)
    session.clear_counts()
    if drafting is not None:
        drafting.counts = DraftCounts()
    try:
        logits = session.prefill(prompt_tokens[reused:], interrupted, reporter)
    except Interrupted:
        elapsed = time.perf_counter() - started
        yield Finish("interrupted", Stats(len(prompt_tokens), reused, 0, elapsed, 0.0, None))
        return
    token = sampler.sample(logits, session.tokens)
    first = last = time.perf_counter()
    count = 0
    decode = session.decode
    if drafting is not None:
        decode = partial(drafting.decode, session, interrupted=interrupted)
    with closing(decode(token, sampler, max_new_tokens - 1)) as following:
        while True:
            if token in stop_token_ids:
                reason: FinishReason = "stop"
                break
            count += 1
            last = time.perf_counter()
            yield Token(token, sampler.chances)
            if interrupted():
                reason = "interrupted"
                break
            if count >= max_new_tokens:
                reason = "length"
                break
            if session.position >= session.max_length:
                reason = "context"
                break
            try:
                token = next(following)
            except Interrupted:
                reason = "interrupted"
                break
    stats = Stats(
        prompt_tokens=len(prompt_tokens),
        reused_tokens=reused,
        new_tokens=count,
        time_to_first_token_s=first - started,
        decode_s=last - first,
        realised_sparsity=session.realised_sparsity(),
        draft=None if drafting is None else drafting.counts,
    )
    yield Finish(reason, stats)
