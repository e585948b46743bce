"""What a session and its statistics know of what guesses tokens for them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from teal_cli.inference.sampling import Sampler

# What may follow: [n] int32 where a device has made it, ahead of the host.
Guesses: TypeAlias = "list[int] | Tensor"


def known(guesses: Guesses) -> list[int]:
    """Guesses for the host, which waits for those of a device."""
    return guesses if isinstance(guesses, list) else guesses.tolist()


@dataclass(slots=True)
class DraftCounts:
    """What guessing did in an answer."""

    rounds: int = 0  # passes over guesses
    guessed: int = 0  # guesses that were looked at: none behind a wrong one
    accepted: int = 0

    @property
    def acceptance(self) -> float | None:
        """The chance of a guess that was looked at; None where there was none."""
        return self.accepted / self.guessed if self.guessed else None

    @property
    def tokens_per_round(self) -> float | None:
        """Tokens that a pass over guesses gave on average, the one after them included."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.rounds + other.rounds,
            self.guessed + other.guessed,
            self.accepted + other.accepted,
        )


class Guesser(Protocol):
    """Decodes a session's tokens with guesses, as `teal_cli.inference.drafting.Drafting` does."""

    counts: DraftCounts

    @property
    def name(self) -> str:
        """Who guesses."""

    @property
    def session(self) -> Any:
        """The session of the model that guesses; None where none does."""

    def warm_up(self, session: Any) -> None:
        """Compile and time what checks and guesses, before the session's first prompt."""

    def decode(
        self,
        session: Any,
        token: int,
        sampler: Sampler,
        most: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Generator[int, None, None]:
        """What the session's own `decode` yields; `interrupted` is asked where guessing reads.

        Raises:
            Interrupted: it said True; what was yielded holds.
        """
