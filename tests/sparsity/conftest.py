"""A tiny decoder with activations of several shapes and sizes; one thread, as it is so small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from threads import one_thread

from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }


@pytest.fixture(scope="session")
def tiny_config(tiny_settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_settings)


@pytest.fixture
def decoder(tiny_config: ModelConfig) -> Decoder:
    return random_decoder(tiny_config, device="cpu", dtype=torch.float32, seed=0)


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Windows of tokens, int64 [6, 40]."""
    return torch.randint(0, 97, (6, 40), generator=torch.Generator().manual_seed(0))
