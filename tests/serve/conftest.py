"""A server in this process, on a tiny random model and a port of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import Setting
from teal_cli.store import hub, models

if TYPE_CHECKING:
    from teal_cli.serve.api import Limits
    from teal_cli.serve.engine import Engine

NAME = "tiny"


class Slow(Session):
    """A session that takes its time for each token, until it is told to hurry."""

    seconds = 0.0

    def step(self, token: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().step(token)


@dataclass
class Running:
    """A server that runs in this process."""

    url: str
    port: int
    engine: Engine
    session: Slow
    uvicorn: Any
    log: list[str] = field(default_factory=list)

    def is_idle(self, seconds: float = 20.0) -> bool:
        """Whether nothing waits or runs, soon."""
        end = time.monotonic() + seconds
        while (self.engine.running or self.engine.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        return not (self.engine.running or self.engine.waiting)


class Thresholds:
    """Stands for a profile: more thresholds for more sparsity."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def setting(self, sparsity: float, method: str | None = None) -> Setting:
        return Setting("uniform", sparsity, torch.full((self._layers, 7), sparsity))


@pytest.fixture(scope="session")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(tmp_path_factory.mktemp("serve-home")))
        source = hub.fetch(models.resolve(str(tiny_model)), reporter=Silent())
        return Checkpoint(convert(source, dtype="float32", reporter=Silent()))


@pytest.fixture(scope="session")
def decoder(checkpoint: Checkpoint) -> Decoder:
    return checkpoint.load()


Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve(checkpoint: Checkpoint, decoder: Decoder) -> Iterator[Serve]:
    """Starts servers, which end with the module."""
    pytest.importorskip("starlette", reason="needs the extra `serve`")
    from teal_cli.serve.api import Limits, build
    from teal_cli.serve.engine import Engine
    from teal_cli.serve.listening import bound, listen
    from teal_cli.serve.model import Model
    from teal_cli.serve.server import server

    started: list[tuple[Running, threading.Thread]] = []

    def start(
        *,
        api_key: str | None = None,
        origins: tuple[str, ...] = (),
        limits: Limits | None = None,
        most_waiting: int = 64,
        prefix_bytes: int = 1 << 20,
        drain_s: float = 5.0,
        of: Checkpoint | None = None,
        profile: Any = None,
        chat: bool = True,
        drafting: Drafting | None = None,
        **changes: Any,
    ) -> Running:
        source, weights = (checkpoint, decoder) if of is None else (of, of.load())
        tokenizer = source.tokenizer()
        if profile is None:
            profile = Thresholds(source.config.num_hidden_layers)
        settings: dict[str, Any] = {
            "sparsity": 0.0,
            "max_length": 400,
            "max_tokens": 24,
            "think_tokens": 100,
            "stop_texts": (),
            "sampling": {"temperature": 0.0},
            **changes,
        }
        served = Model(
            name=NAME,
            fingerprint=source.fingerprint,
            tokenizer=tokenizer,
            template=ChatTemplate.of(tokenizer) if chat else None,
            eos_token_ids=source.eos_token_ids,
            profile=profile or None,
            method=None,
            **settings,
        )
        session = Slow(weights, max_length=served.max_length, backend="reference")
        session.drafting = drafting
        log: list[str] = []
        engine = Engine(
            served,
            session,
            most_waiting=most_waiting,
            prefix_bytes=prefix_bytes,
            note=log.append,
        )
        app = build(
            engine, limits or Limits(60.0), api_key=api_key, origins=origins, tell=log.append
        )
        sock: socket.socket = bound("127.0.0.1", 0)
        url, port = listen(sock), sock.getsockname()[1]
        runner = server(app, engine, drain_s=drain_s)
        thread = threading.Thread(target=runner.run, args=([sock],), daemon=True)
        thread.start()
        while not runner.started:
            time.sleep(0.005)
        running = Running(url, port, engine, session, runner, log)
        started.append((running, thread))
        return running

    yield start
    for running, thread in started:
        running.session.seconds = 0.0
        running.uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not running.engine.is_alive
