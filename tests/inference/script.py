"""A model that says what it is told to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teal_cli.inference.session import Session


class Script(Session):
    """A session whose model says what it is told to, whatever the prompt."""

    lines: list[list[int]]
    prefilled: int

    def prefill(self, tokens: Any, interrupted: Any = None, reporter: Any = None) -> Tensor:
        self.tokens += list(tokens)
        self.prefilled = len(tokens)
        self.queue = iter(self.lines.pop(0))
        return self._say()

    def step(self, token: int) -> Tensor:
        self.tokens.append(token)
        return self._say()

    def _say(self) -> Tensor:
        token = torch.tensor(next(self.queue))
        return torch.nn.functional.one_hot(token, self.decoder.config.vocab_size).float()
