"""A chat with a tiny random model, with a chat template and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from teal_cli import console
from teal_cli.chat.state import Chat
from teal_cli.inference.conversation import Conversation
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder
from teal_cli.sparsity.setting import Setting

CONFIG = tiny.config(num_hidden_layers=2)


class FakeProfile:
    """Skips channels below the sparsity itself, and counts how often it was asked."""

    default_method = "uniform"

    def __init__(self) -> None:
        self.asked: list[tuple[float, str | None]] = []

    def setting(self, sparsity: float, method: str | None, *, recover: bool = True) -> Setting:
        self.asked.append((sparsity, method))
        levels = torch.full((CONFIG.num_hidden_layers, 7), sparsity)
        return Setting(method or self.default_method, sparsity, levels)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return random_decoder(CONFIG, device="cpu", dtype=torch.float32, seed=0)


@pytest.fixture(scope="module", params=[True, False], ids=["template", "base"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder, chat=request.param)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def profile() -> FakeProfile:
    return FakeProfile()


@pytest.fixture
def chat(
    decoder: Decoder, tokenizer: Any, profile: FakeProfile, monkeypatch: pytest.MonkeyPatch
) -> Chat:
    monkeypatch.setattr(console, "_settings", console._Settings())
    session = Session(decoder, max_length=300, backend="reference")
    conversation = Conversation(session, tokenizer, Sampler(Sampling(seed=2)), stop_token_ids=[2])
    return Chat(
        model="org/tiny",
        weights="float32",
        session=session,
        conversation=conversation,
        profile=lambda: profile,  # type: ignore[arg-type, return-value]
        method=None,
        max_tokens=8,
    )
