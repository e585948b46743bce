"""A tiny random decoder for the inference tests."""

from __future__ import annotations

import pytest
import tiny
import torch

from teal_cli.model.decoder import Decoder
from teal_cli.model.random_weights import random_decoder

CONFIG = tiny.config(max_position_embeddings=256)


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    return random_decoder(CONFIG, device="cpu", dtype=torch.float32, seed=0)


@pytest.fixture(scope="session")
def thresholds() -> torch.Tensor:
    """A different threshold for each projection, which skip about a third of the channels."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([0.4, 0.3, 0.5, 0.1, 0.4, 0.5, 0.05])
    return levels * (0.8 + 0.4 * torch.rand(CONFIG.num_hidden_layers, 7, generator=generator))
