"""What is compiled when: nobody waits for kernels of what they do not do, and none is silent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from teal_kernels.cpu import prefill as prefill_module
from teal_kernels.cpu import step as step_module

from teal_cli.inference.drafters import Lookup
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Silent, Task

START, CHECKING = "compiling the kernels, once", "compiling the kernels that check guesses, once"


class Compiled(Silent):
    """Keeps which functions were compiled, each with the task that it was part of."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str | None]] = []
        self.label: str | None = None

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: str = "it") -> Iterator[Task]:
        self.label = label
        with super().task(label) as task:
            yield task
        self.label = None


@pytest.fixture(params=[False, True], ids=["nothing-kept", "all-kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether compiled code is found on disk."""
    monkeypatch.setattr(prefill_module, "_is_kept", lambda *_: request.param)
    return bool(request.param)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    reporter, compile_ = Compiled(), step_module._compile

    def noted(function: Any, arguments: Any) -> Any:
        reporter.found.append((function.__name__, reporter.label))
        return compile_(function, arguments)

    for module in (prefill_module, step_module):
        monkeypatch.setattr(module, "_compile", noted)
    return reporter


def test_only_drafts_compile_what_checks_them(
    decoder: Decoder, compiled: Compiled, kept: bool
) -> None:
    """A chat does not, whose first prompt may be short."""
    session = Session(decoder, max_length=60, reporter=compiled)
    session.prefill([1, 2, 3])
    session.prefill(list(range(20)))
    session.step(4)
    start = None if kept else START
    assert compiled.found == [("decode", start), ("read_many", start)]
    compiled.found.clear()
    session.drafting = Drafting([Lookup()])
    session.drafting.warm_up(session)
    assert compiled.found == [("read_few", None if kept else CHECKING)]
    session.verify([5, 6, 7])
    assert len(compiled.found) == 1


def test_ctrl_c_while_compiling(
    decoder: Decoder, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session can be used as before, and the next draft compiles."""
    session = Session(decoder, max_length=60, reporter=compiled)
    session.prefill([1, 2, 3])

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prefill_module, "_compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.verify([5, 6])
    assert session.tokens == [1, 2, 3]
    assert session.verify([5, 6]).shape[0] == 2
    assert compiled.found[-1][0] == "read_few"
