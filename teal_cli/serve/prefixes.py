"""Keys and values of the last conversations, so that one that goes on reads its new part only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from teal_cli.inference.session import Session, common_prefix
from teal_cli.sparsity.setting import Setting

# Less than this is read sooner than it is kept.
_LEAST_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """Tokens, and how their keys came about.

    The first `dense` were computed dense, as prompts are; those after them hold for `setting` only.
    """

    tokens: tuple[int, ...]
    dense: int
    setting: Setting

    def usable(self, prompt: Sequence[int], setting: Setting) -> int:
        """How many of a prompt's tokens need not be computed for an answer under a setting."""
        common = common_prefix(self.tokens, prompt[:-1])
        return common if setting is self.setting else min(common, self.dense)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    known: _Known
    keys: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Prefixes:
    """Prepares a session for prompts, and keeps copies of what it then forgets."""

    def __init__(self, session: Session, most_bytes: int) -> None:
        """Start with nothing kept.

        Args:
            session: decodes; between answers its tokens are left alone.
            most_bytes: of keys and values, beside the session's own; the oldest go first.
        """
        self._session = session
        self._most_bytes = most_bytes
        self._kept: list[_Kept] = []  # the one used last at the end
        self._dense = 0  # tokens of the session that were computed dense

    @property
    def nbytes(self) -> int:
        """What is kept beside the session's own cache."""
        return sum(kept.nbytes for kept in self._kept)

    def prepare(self, prompt: Sequence[int], setting: Setting) -> None:
        """Leave in the session what it has of a prompt, and put the setting on it.

        Args:
            prompt: all of its tokens.
            setting: what its answer is decoded under.
        """
        session = self._session
        here = _Known(tuple(session.tokens), self._dense, session.setting)
        usable = here.usable(prompt, setting)
        best = max(self._kept, key=lambda kept: kept.known.usable(prompt, setting), default=None)
        found = 0 if best is None else best.known.usable(prompt, setting)
        if session.position - usable >= _LEAST_TOKENS:
            self._keep(here)
        session.rewind(usable)
        dense = here.dense
        if best is not None and found > usable:
            session.append_cached(
                prompt[usable:found], best.keys[:, :, usable:found], best.values[:, :, usable:found]
            )
            dense = best.known.dense if usable <= dense else dense
            if best in self._kept:  # it may have had to go
                self._kept.remove(best)
                self._kept.append(best)
        # What is read now is computed dense too, but stands on what comes before it.
        self._dense = len(prompt) if session.position <= dense else dense
        session.use(setting)

    def _keep(self, known: _Known) -> None:
        """Copy the session's keys, in place of those of a beginning of the same tokens."""
        session = self._session
        size = session.position * (session.cache.nbytes // session.cache.length)
        if size > self._most_bytes:
            return
        self._kept = [kept for kept in self._kept if not _begins(kept.known, known)]
        while self.nbytes + size > self._most_bytes:
            del self._kept[0]
        self._kept.append(_Kept(known, *session.cache.read(0, session.position)))


def _begins(short: _Known, long: _Known) -> bool:
    """Whether all that one is good for the other is good for as well."""
    if short.dense > long.dense or tuple(long.tokens[: len(short.tokens)]) != short.tokens:
        return False
    return short.setting is long.setting or len(short.tokens) <= long.dense
