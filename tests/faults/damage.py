"""Ways to damage what teal reads, as Hypothesis strategies, and what may come of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hypothesis import strategies as st

from teal_cli.errors import TealError

T = TypeVar("T")

_NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**12, 10**30, 1e-300, 1e300)
_NESTED = 100_000  # brackets: more than Python's parser takes


def outcome(action: Callable[[], T]) -> T | None:
    """What the action returns, or None where it ends in a sentence; all else fails the test."""
    try:
        return action()
    except TealError:
        return None


def scalars() -> st.SearchStrategy[Any]:
    """Anything that JSON can hold in one place, the usual mistakes above all."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(_NUMBERS),
        st.integers(-300, 300),
        st.floats(),
        st.sampled_from(["", "64", "NaN", "\0", "\ud800", "../x", "float16", "default"]),
        st.text(max_size=8),
    )


def values() -> st.SearchStrategy[Any]:
    """Any small JSON value."""
    return st.recursive(
        scalars(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=4,
    )


def changed(
    document: Mapping[str, Any], also: Mapping[str, st.SearchStrategy[Any]] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """A JSON object with one to three fields changed or taken away.

    Args:
        document: the object as it should be.
        also: fields that it may get, and what they are likely to be; others get any value.
    """
    also = also or {}
    names = sorted({*document, *also})
    gone = object()

    def field(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        likely = [also[name]] if name in also else []
        return st.tuples(st.just(name), st.one_of(st.just(gone), values(), *likely, *likely))

    changes = st.lists(st.sampled_from(names).flatmap(field), min_size=1, max_size=3)

    def apply(found: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: v for k, v in {**document, **dict(found)}.items() if v is not gone}

    return changes.map(apply)


def texts(document: Any) -> st.SearchStrategy[bytes]:
    """JSON that is cut short, or none at all."""
    whole = json.dumps(document).encode()
    return st.one_of(
        st.integers(0, len(whole) - 1).map(lambda size: whole[:size]),
        st.sampled_from(
            [
                b"[" * _NESTED,
                b'{"a":' * _NESTED,
                b'{"hidden_size": ' + b"9" * 5000 + b"}",
                b"\xff\xfe{}",
                b"\xef\xbb\xbf{}",
                b"[]",
                b"null",
                b'"text"',
                b"",
            ]
        ),
        st.binary(max_size=40),
    )


def json_files(
    document: Mapping[str, Any], also: Mapping[str, st.SearchStrategy[Any]] | None = None
) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file with a fault: in its fields mostly, else in its syntax."""
    faulty = changed(document, also).map(lambda content: json.dumps(content).encode())
    return st.one_of(faulty, faulty, faulty, texts(document))


@st.composite
def spoilt(draw: st.DrawFn, content: bytes, *, within: int | None = None) -> bytes:
    """Bytes with some replaced by others, mostly in the first `within`, or with the end gone."""
    out = bytearray(content)
    within = min(within or len(out), len(out))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, within - 1))
        width = draw(st.sampled_from([1, 1, 2, 4, 8]))
        number = draw(st.sampled_from([0, 1, 7, 255, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
        piece = (number % 256**width).to_bytes(width, "little")
        out[start : start + width] = piece[: len(out) - start]
    if draw(st.integers(0, 3)) == 0:
        del out[draw(st.integers(0, len(out))) :]
    return bytes(out)
