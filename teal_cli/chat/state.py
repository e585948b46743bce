"""What a running chat consists of, and what its commands change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from teal_cli.errors import UsageError
from teal_cli.inference.sampling import Sampler
from teal_cli.sparsity.setting import DENSE, Setting, check_target
from teal_cli.suggestions import did_you_mean

if TYPE_CHECKING:
    from teal_cli.inference.conversation import Conversation
    from teal_cli.inference.generate import Finish, Stats
    from teal_cli.inference.guesses import DraftCounts
    from teal_cli.inference.session import Session
    from teal_cli.sparsity.profile import Profile

SAMPLING_KEYS = ("temperature", "top-k", "top-p", "min-p", "repetition-penalty", "seed")
COUNT_KEYS = ("max-tokens", "think-tokens")
KEYS = (*SAMPLING_KEYS, *COUNT_KEYS)


@dataclass(slots=True)
class Totals:
    """Sums over the answers so far."""

    answers: int = 0
    new_tokens: int = 0
    timed_tokens: int = 0  # decoded after an answer's first token
    decode_s: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    draft: DraftCounts | None = None  # where something guesses tokens

    def add(self, stats: Stats) -> None:
        """Count one more answer."""
        self.answers += 1
        self.new_tokens += stats.new_tokens
        self.timed_tokens += max(stats.new_tokens - 1, 0)
        self.decode_s += stats.decode_s
        self.prompt_tokens += stats.prompt_tokens
        self.reused_tokens += stats.reused_tokens
        if stats.draft is not None:
            self.draft = stats.draft if self.draft is None else self.draft + stats.draft


@dataclass(slots=True)
class Chat:
    """A conversation with a loaded model, at a sparsity that can be changed.

    `weights` names the form that they are stored in. `profile` loads the model's thresholds where
    they are first needed, `method` is how they share sparsity out (None is the profile's best), and
    `recover` whether its vectors are used.
    """

    model: str
    weights: str
    session: Session
    conversation: Conversation
    profile: Callable[[], Profile]
    method: str | None
    max_tokens: int
    recover: bool = True
    think_tokens: int = 2048
    compare: bool = False
    plain: bool = True
    silent: bool = False  # answers are handed over, not shown
    last: Finish | None = None
    totals: Totals = field(default_factory=Totals)

    @property
    def setting_in_force(self) -> Setting:
        """How sparse tokens are decoded, or where a model guesses them, its guesses."""
        return self._sparse.setting

    @property
    def sparsity(self) -> float:
        """The target of that setting."""
        return self.setting_in_force.target_sparsity

    def set_sparsity(self, sparsity: float) -> None:
        """Change the loaded model, or the one that guesses for it, from the next token on.

        Raises:
            UsageError: the sparsity is not in [0, 1), or only text guesses.
            TealError: the profile does not reach it.
        """
        check_target(sparsity)  # before a profile is made for it
        if sparsity and self.session.drafting is not None and self.session.drafting.session is None:
            raise UsageError(
                "the model that checks guesses is dense, and text that is looked up has no sparsity"
            )
        setting = DENSE
        if sparsity:
            setting = self.profile().setting(sparsity, self.method, recover=self.recover)
        self._sparse.use(setting)

    @property
    def _sparse(self) -> Session:
        """Whose sparsity it is: with --draft, that of the session that guesses."""
        drafting = self.session.drafting
        return (drafting.session if drafting is not None else None) or self.session

    def setting(self, key: str) -> str:
        """The value of one of KEYS, as text."""
        if key in COUNT_KEYS:
            return str(getattr(self, key.replace("-", "_")))
        value = getattr(self.conversation.sampler.sampling, key.replace("-", "_"))
        return "none" if value is None else f"{value:g}" if key != "seed" else str(value)

    def set(self, key: str, text: str) -> None:
        """Change one of KEYS.

        Raises:
            UsageError: there is no such key, or the value is not one for it.
        """
        key = key.lower().replace("_", "-")
        if key not in KEYS:
            hint = f"{did_you_mean(key, KEYS)}There are: {', '.join(KEYS)}."
            raise UsageError(f"there is no setting {key!r}", hint=hint)
        if key in COUNT_KEYS:
            value = _number(key, text, int)
            if value < 1:
                raise UsageError(f"{key} must be 1 or more, got {text}")
            setattr(self, key.replace("-", "_"), int(value))
            return
        sampler = self.conversation.sampler
        if key == "seed":
            seed = None if text == "none" else int(_number(key, text, int))
            self.conversation.sampler = Sampler(replace(sampler.sampling, seed=seed))
            return
        changed = {key.replace("-", "_"): _number(key, text, int if key == "top-k" else float)}
        sampler.sampling = replace(sampler.sampling, **changed)  # type: ignore[arg-type]


def _number(key: str, text: str, kind: type[int] | type[float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise UsageError(f"{key} takes {whole}, not {text!r}") from None
