"""The two ways in which published perplexities of sparse models are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from teal_cli.errors import UsageError
from teal_cli.model.config import ModelConfig

ProtocolName = Literal["standard", "teal"]

# Attention sinks (arXiv 2309.17453): the first positions of a context carry activations up to a
# thousand times the usual ones, and decoding after a prompt never makes them sparse.
_DENSE_POSITIONS = 4

_DEFAULT_CONTEXT = 2048
_TEAL_CONTEXT, _TEAL_SCORED = 2048, 512


@dataclass(frozen=True, slots=True)
class Protocol:
    """What of a window is sparse and what of it counts.

    Positions below `sparse_from` are computed dense; the tokens from `scored_from` on are
    predicted and scored. A window begins `stride` tokens after the one before.
    """

    name: ProtocolName
    window: int
    stride: int
    sparse_from: int
    scored_from: int

    @property
    def scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.window - self.scored_from

    def cut(self, tokens: Callable[[int], Tensor]) -> Tensor:
        """The windows of a text, int64 [N, window].

        Args:
            tokens: seq_len → the text as consecutive windows [N, seq_len].

        Raises:
            TealError: the text is shorter than one window; `tokens` raises it.
        """
        if self.stride == self.window:
            return tokens(self.window)
        rows = tokens(self.stride)
        if len(rows) < self.window // self.stride:
            return tokens(self.window)
        return rows.flatten().unfold(0, self.window, self.stride)


def spread(windows: int, samples: int | None) -> list[int]:
    """Which `samples` of a text's windows speak for all of it: evenly spread, the ends included.

    All of them where there are no more, or where `samples` is None.
    """
    if samples is None or samples >= windows:
        return list(range(windows))
    if samples == 1:
        return [0]
    return [round(number * (windows - 1) / (samples - 1)) for number in range(samples)]


def sparse_from(name: ProtocolName, length: int) -> int:
    """The first sparse position of a sequence of `length` tokens that the model is fed at once.

    `standard`: all but the first few positions are sparse. `teal`: the last half is.
    """
    return _DENSE_POSITIONS if name == "standard" else length - length // 2


def task_context(config: ModelConfig, context: int | None) -> int:
    """Tokens that a model sees at most in a task; by default all that it has room for.

    Raises:
        UsageError: the model has no room for `context`.
    """
    return _checked(config.context_length if context is None else context, config)


def protocol(name: ProtocolName, config: ModelConfig, context: int | None = None) -> Protocol:
    """A protocol at a model's size.

    `standard`: windows of the context length side by side, every token but the first scored,
    every position but the first few sparse. `teal`: 2048 tokens of context and 512 scored ones,
    windows 512 apart, the last half of a window sparse (arXiv 2408.14690, section 5.1, and the
    authors' evaluation code).

    Args:
        name: which.
        config: the model's.
        context: tokens in a window of `standard`; by default 2048, or the model's if shorter.

    Raises:
        UsageError: the model has no room for such windows, or `context` does not apply.
    """
    longest = config.context_length
    if name == "teal":
        window = _TEAL_CONTEXT + _TEAL_SCORED
        if context not in (None, window):
            raise UsageError(f"the protocol 'teal' has windows of {window} tokens; no --context")
        if window > longest:
            raise UsageError(
                f"the protocol 'teal' needs a context of {window} tokens, this model has {longest}",
                hint="Use --protocol standard.",
            )
        return Protocol(name, window, _TEAL_SCORED, sparse_from(name, window - 1), _TEAL_CONTEXT)
    window = min(_DEFAULT_CONTEXT, longest) if context is None else context
    _checked(window, config)
    return Protocol(name, window, window, sparse_from(name, window - 1), 1)


def _checked(context: int, config: ModelConfig) -> int:
    longest = config.context_length
    if not _DENSE_POSITIONS < context <= longest:
        raise UsageError(
            f"a context of {context} tokens is out of range: "
            f"{_DENSE_POSITIONS + 1} to {longest} fit this model"
        )
    return context
