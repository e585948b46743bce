"""From logits to the next token: greedy, or drawn with what transformers calls warpers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal_cli.errors import TealError, UsageError

# Top-p needs the likeliest tokens in order, and they nearly always lie within the first 1024:
# sorting a vocabulary of 49 152 takes a Zen 3 core 4 ms, finding 1024 of them 0.6 ms.
_FIRST_CANDIDATES = 1024

# Temperatures and penalties are held between this and its inverse, so that no product with a logit
# leaves float32; a temperature below it counts as 0. The device's sampler has the same bounds.
_LEAST = 1e-30


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Applied in this order, which is transformers': `repetition_penalty` (logits of the tokens in
    the sequence so far are divided by it, or multiplied where negative; 1 is none), `temperature`
    (0 is greedy, and nothing below is used), `top_k` (-1 and 0 are all tokens), `top_p` (the
    smallest set of tokens whose probabilities, renormalised after top-k, reach it; 1 is all),
    `min_p` (tokens with this share of the likeliest one's probability; 0 is all).
    `presence_penalty` and `frequency_penalty` are OpenAI's: taken off the logit of a token that the
    answer has already, once and for each time; below 0 they are added.
    The same `seed` gives the same tokens; None is a new one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be 0 or more, and finite, got {self.temperature:g}")
        if not -1 <= self.top_k < 2**31:
            raise UsageError(
                f"top-k must be 1 or more, and below 2^31, or 0 or -1 for all, got {self.top_k}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top-p must be above 0 and at most 1, got {self.top_p:g}")
        if not 0.0 <= self.min_p <= 1.0:
            raise UsageError(f"min-p must be from 0 to 1, got {self.min_p:g}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise UsageError(
                f"repetition-penalty must be above 0, and finite, got {self.repetition_penalty:g}",
                hint="1 is none, 1.1 a usual one.",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise UsageError(
                    f"{name.replace('_', '-')} must be from -2 to 2, got {getattr(self, name):g}"
                )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < _LEAST or self.top_k == 1

    @property
    def on_device(self) -> dict[str, Any]:
        """What a device is told that chooses by itself; it knows no penalties of the answer."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Chances:
    """How likely the model found a token, and the likeliest in its place: natural logarithms.

    They are the model's own, before temperature, penalties and cuts.
    """

    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # token ids, the likeliest first


class Sampler:
    """Draws tokens; holds the random state of one answer or conversation.

    A draw is the token that comes first where each waits for a time that its noise, exponential,
    and its probability set. The noise is a function of one number and of the token, so that two
    distributions that are alike give the same token for the same number (Daliri, Musco and
    Suresh, arXiv 2408.07978, section 3): a small model then guesses what a large one draws.
    """

    def __init__(
        self, sampling: Sampling, *, answer_from: int = 0, top_logprobs: int | None = None
    ) -> None:
        """Seed the draws.

        Args:
            sampling: how to choose.
            answer_from: position of the answer's first token, where penalties that regard the
                answer alone begin.
            top_logprobs: note `chances` of each choice, with so many of the likeliest tokens.
        """
        self.sampling = sampling
        self.chances: Chances | None = None  # of the last choice
        self._answer_from = answer_from
        self._top_logprobs = top_logprobs
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            # torch takes 64 bits; Python's remainder folds every other integer into them.
            self._generator.manual_seed(sampling.seed % 2**64)

    @property
    def needs_logits(self) -> bool:
        """Whether each choice needs the logits here, so that no step can make it by itself."""
        sampling = self.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty
        return self._top_logprobs is not None or penalties != (0.0, 0.0)

    def sample(self, logits: Tensor, tokens: Sequence[int] = (), noise: int | None = None) -> int:
        """The next token id.

        Args:
            logits: [vocab_size], of any float dtype on any device.
            tokens: the sequence so far, for penalties.
            noise: the draw's number, as `at_position` makes them; None is a new one.

        Raises:
            TealError: the logits have a NaN, or infinity, or nothing that is finite.
        """
        own = logits
        logits = penalised(logits, tokens, self.sampling.repetition_penalty)
        logits = self._less_said(logits, tokens[self._answer_from :])
        token = self._choice(logits, noise)
        if self._top_logprobs is not None:
            self.chances = _chances(own, token, self._top_logprobs)
        return token

    def _choice(self, logits: Tensor, noise: int | None) -> int:
        largest, likeliest = logits.max(dim=-1)  # NaN, if there is one
        if not largest.isfinite():
            raise not_finite()
        if self.sampling.greedy:
            return int(likeliest)
        # Drawn on the CPU, so that a seed means the same on every device.
        probabilities, chosen_from = (t.cpu() for t in candidates(logits, self.sampling))
        waits = _exponential(self.draw_seed() if noise is None else noise, chosen_from)
        return int(chosen_from[int((waits / probabilities).argmin())])

    def _less_said(self, logits: Tensor, answer: Sequence[int]) -> Tensor:
        """Logits [vocab_size] float32 with OpenAI's penalties for what the answer has already."""
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if not answer or (presence, frequency) == (0.0, 0.0):
            return logits
        said = torch.tensor(answer, dtype=torch.int64, device=logits.device)
        times = torch.bincount(said, minlength=logits.numel())
        return logits.float() - frequency * times - presence * (times > 0)

    def draw_seed(self) -> int:
        """A seed in [0, 2^63) for noise that is made elsewhere; another each time."""
        return int(torch.randint(2**63 - 1, (), generator=self._generator))


def at_position(seed: int, position: int) -> int:
    """The number of the draw at a position, in [0, 2^64), by splitmix64."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def _exponential(number: int, tokens: Tensor) -> Tensor:
    """Noise [C] float64, exponential with mean 1, for each of the tokens [C] int64 of a draw.

    The stream of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) from `number`, by token.
    """
    start = torch.tensor(_signed(number % 2**64))  # sums and products wrap around at 64 bits
    z = start + (tokens + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    uniform = (_shifted(z ^ _shifted(z, 31), 11).double() + 0.5) * 2.0**-53
    return -uniform.log()


def _signed(number: int) -> int:
    """A number of 64 bits as int64 holds it."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted to the right, with zeros from the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _chances(logits: Tensor, token: int, top: int) -> Chances:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, tokens = logprobs.topk(min(top, logits.numel()))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return Chances(float(logprobs[token]), tuple(pairs))


def not_finite() -> TealError:
    """The error where the logits leave nothing to choose from."""
    return TealError(
        "the logits are not finite, so there is no next token",
        hint="An activation has overflowed float16, or a weight is damaged: try --dtype bfloat16"
        " or float32; if the answer was sparse, less --sparsity.",
    )


def penalised(logits: Tensor, tokens: Sequence[int], penalty: float) -> Tensor:
    """Logits [vocab_size], float32 those of `tokens` made less likely by a penalty above 1.

    The repetition penalty of CTRL (arXiv 1909.05858, section 4.1), as transformers has it.
    """
    if penalty == 1 or not tokens:
        return logits
    penalty = min(max(penalty, _LEAST), 1 / _LEAST)
    seen = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    logits = logits.float()
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values < 0, values * penalty, values / penalty))


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may come next, and their probabilities.

    Args:
        logits: [vocab_size], penalised; the largest is finite.
        sampling: one that is not greedy.

    Returns:
        Probabilities [C] float32, which sum to 1, and token ids [C] int64; the likeliest first
        where top-p is set.
    """
    temperature = min(sampling.temperature, 1 / _LEAST)
    # The largest logit is taken off first: a tiny temperature would turn it into infinity.
    logits = logits.float() - logits.max().float()
    tokens = torch.arange(logits.numel(), device=logits.device)
    if 0 < sampling.top_k < logits.numel():
        # Those that tie with the last one stay.
        tokens = (logits >= logits.topk(sampling.top_k).values[-1]).nonzero().flatten()
        logits = logits[tokens]
    if sampling.top_p < 1.0:
        reached = _reaching(logits / temperature, sampling.top_p)
        logits, tokens = logits[reached], tokens[reached]
    if sampling.min_p > 0.0:
        likely = logits >= temperature * math.log(sampling.min_p)
        logits, tokens = logits[likely], tokens[likely]
    return torch.softmax(logits / temperature, dim=-1), tokens


def _reaching(scores: Tensor, top_p: float) -> Tensor:
    """Indices of the likeliest scores [C] whose probabilities sum to top_p, the largest first."""
    log_total = torch.logsumexp(scores, dim=-1)
    values, order = scores.topk(min(_FIRST_CANDIDATES, scores.numel()))
    if torch.exp(values - log_total).sum() < top_p:
        values, order = scores.sort(descending=True)
    probabilities = torch.exp(values - log_total)
    before = probabilities.cumsum(-1) - probabilities
    before[0] = -1.0  # the likeliest stays, however small top_p is
    return order[before < top_p]
