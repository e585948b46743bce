"""Where guesses come from: the text so far, or a model that is cheaper than the one it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Protocol

from torch import Tensor

from teal_cli.inference.guesses import Guesses
from teal_cli.inference.pace import LENGTHS
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session, common_prefix

# Tokens that must be the same for the text to count as repeating: two are so too often by chance.
_NGRAM = 3


class Drafter(Protocol):
    """Guesses what a model will say."""

    name: str

    def read(self, tokens: Sequence[int], interrupted: Callable[[], bool] = lambda: False) -> None:
        """Get to know a prompt, so that no guess takes that time.

        Raises:
            Interrupted: `interrupted` said True.
        """

    def propose(
        self, tokens: Sequence[int], token: int, most: int, sampler: Sampler, seed: int
    ) -> Guesses:
        """Guesses for what follows `token`, perhaps none.

        Args:
            tokens: the sequence before it.
            token: the last one that was chosen.
            most: guesses to make.
            sampler: how the model's tokens are chosen.
            seed: with the position it makes the noise of their choices.
        """


class Lookup:
    """Guesses that the text goes on as it did after the same words before."""

    name = "lookup"

    def __init__(self, *, everywhere: bool = False) -> None:
        """`everywhere`: guess where nothing repeats, too, as if it did: to measure speed."""
        self._everywhere = everywhere
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where each n-gram was followed last

    def read(self, tokens: Sequence[int], interrupted: Callable[[], bool] = lambda: False) -> None:
        """Note what followed what in the prompt."""
        text = [*tokens]
        if text[: len(self._text)] != self._text:
            self._text, self._after = [], {}
        for i in range(max(len(self._text), _NGRAM), len(text)):
            self._after[tuple(text[i - _NGRAM : i])] = i
        self._text = text

    def propose(
        self, tokens: Sequence[int], token: int, most: int, sampler: Sampler, seed: int
    ) -> list[int]:
        """What followed the last few tokens where they stood last; see `Drafter`."""
        self.read([*tokens, token])
        text = self._text
        start = self._after.get(tuple(text[-_NGRAM:]))
        if start is None:
            return [token] * most if self._everywhere else []
        period = len(text) - start  # what repeats right behind itself goes on doing so
        return [text[start + i % period] for i in range(most)]


class ModelDrafter:
    """Guesses what a cheaper model says, in a session of its own.

    It draws with the noise of the model's own choice at each position, so that the two draw the
    same token wherever their distributions are near each other.
    """

    def __init__(
        self, name: str, session: Session, vocab_size: int, *, shares_cache: bool = False
    ) -> None:
        """Bind to a session.

        Args:
            name: what statistics call it.
            session: decodes the guesses, sparse or not.
            vocab_size: of the model that it guesses for: vocabularies are padded differently.
            shares_cache: its keys and values are the model's own, which writes them anew.
        """
        self.name = name
        self.session = session
        self._vocab_size = min(vocab_size, session.decoder.config.vocab_size)
        self._shares_cache = shares_cache

    def read(self, tokens: Sequence[int], interrupted: Callable[[], bool] = lambda: False) -> None:
        """Compute the keys and values of a prompt, unless they are shared."""
        own = self.session
        own.rewind(common_prefix(own.tokens, tokens))
        unread = tokens[own.position :]
        fits = len(tokens) < own.max_length and max(unread, default=0) < self._vocab_size
        if self._shares_cache:
            own.tokens += unread
        elif len(unread) > LENGTHS[-1] and fits:
            own.prefill(unread, interrupted)

    def propose(
        self, tokens: Sequence[int], token: int, most: int, sampler: Sampler, seed: int
    ) -> Guesses:
        """What the cheaper model says; none beyond its context; see `Drafter`."""
        own = self.session
        self.read(tokens)
        most = min(most, own.max_length - len(tokens))
        unread = tokens[own.position :]
        if most < 1 or len(unread) > LENGTHS[-1] or max([*unread, token]) >= self._vocab_size:
            return []
        for said in unread:  # since the last round
            own.step(said)
        if own.decodes_ahead and not sampler.needs_logits:
            return own.guess(token, sampler, most, seed).clamp_(max=self._vocab_size - 1)
        with closing(own.decode(token, sampler, most, seed)) as guesses:
            return list(takewhile(lambda guess: guess < self._vocab_size, guesses))

    def made(self, token: int, guesses: list[int]) -> None:
        """Note what `propose`, which did not wait, has decoded; the last guess is not read yet."""
        self.session.tokens += [token, *guesses[:-1]]

    def go_on(
        self,
        guesses: Tensor,
        choices: Tensor,
        most: int,
        sampler: Sampler,
        seed: int,
        assumed: int,
    ) -> Tensor | None:
        """Guesses behind those of its last ones that are right, before the host knows which.

        None where it has to wait for the host: to tell it what a repetition penalty counts, or,
        with a cache of its own, to have it read the last guess where that is right.

        Args:
            guesses: the last ones, [n] int32.
            choices: [n + 1] int32, what the model chooses before and after each of them.
            most: guesses to make.
            sampler: how the model's tokens are chosen.
            seed: with the position it makes the noise of their choices.
            assumed: a bit for each guess, whether it counts as right whatever was chosen; -1
                assumes nothing.
        """
        if not self._shares_cache or sampler.sampling.repetition_penalty != 1:
            return None
        return self.session.guess_on(guesses, choices, sampler, most, seed, assumed)
