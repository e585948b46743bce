"""The queue: in order for each, in turns for all, bounded."""

from __future__ import annotations

import threading

import pytest

from teal_cli.serve.waiting import FairQueue, Full


def test_everyone_has_a_turn() -> None:
    queue: FairQueue[str] = FairQueue(10)
    for who, entry in [*(("a", f"a{n}") for n in range(4)), ("b", "b0"), ("b", "b1"), ("c", "c0")]:
        queue.put(who, entry)
    assert [queue.take() for _ in range(7)] == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_a_full_queue_takes_no_more_until_one_leaves() -> None:
    queue: FairQueue[int] = FairQueue(2)
    queue.put("a", 1)
    queue.put("b", 2)
    with pytest.raises(Full):
        queue.put("c", 3)
    queue.remove("a", 1)
    queue.remove("a", 1)  # gone already
    queue.put("c", 3)
    assert [queue.take(), queue.take(), len(queue)] == [2, 3, 0]


def test_closing_wakes_who_takes_and_hands_back_what_waits() -> None:
    queue: FairQueue[int] = FairQueue(2)
    taken: list[int | None] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()))
    taker.start()
    assert queue.close() == []
    taker.join(10)
    assert taken == [None]
    with pytest.raises(Full):
        queue.put("a", 1)
    other: FairQueue[int] = FairQueue(2)
    other.put("a", 1)
    assert (other.close(), other.take()) == ([1], None)
