"""The queue of requests: bounded, and fair to everyone who asks."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Full(Exception):
    """The queue takes no more."""


class FairQueue(Generic[T]):
    """First come, first served for each who asks, and these take turns.

    So one who sends many requests at once does not keep the others waiting.
    """

    def __init__(self, most: int) -> None:
        """Bound the queue at so many entries."""
        self._most = most
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()  # whose turn is next comes first
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._lines.values()))

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    def put(self, who: str, entry: T) -> None:
        """Let an entry wait.

        Raises:
            Full: the bound is reached, or the queue is closed.
        """
        with self._changed:
            if self._closed or sum(map(len, self._lines.values())) >= self._most:
                raise Full
            self._lines.setdefault(who, deque()).append(entry)
            self._changed.notify()

    def take(self) -> T | None:
        """The next entry, waited for; None once the queue is closed and empty."""
        with self._changed:
            while not self._lines and not self._closed:
                self._changed.wait()
            if not self._lines:
                return None
            who, line = self._lines.popitem(last=False)
            entry = line.popleft()
            if line:
                self._lines[who] = line  # behind the others
            return entry

    def remove(self, who: str, entry: T) -> None:
        """Let an entry that may still be waiting wait no more."""
        with self._changed:
            line = self._lines.get(who)
            if line is not None and entry in line:
                line.remove(entry)
                if not line:
                    del self._lines[who]

    def close(self) -> list[T]:
        """Take nothing more; return what was waiting."""
        with self._changed:
            left = [entry for line in self._lines.values() for entry in line]
            self._lines.clear()
            self._closed = True
            self._changed.notify_all()
            return left
