"""One thread: at these sizes a second one only waits, for long where cores are shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threads import one_thread


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
