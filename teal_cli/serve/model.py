"""What is served: a model under its names, and how its requests are prepared."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

from teal_cli.errors import TealError
from teal_cli.inference.chat_template import ChatTemplate, check_think
from teal_cli.inference.ends import stop_token_ids
from teal_cli.inference.prompts import Prompts
from teal_cli.inference.sampling import Sampling
from teal_cli.inference.text_stream import Limits
from teal_cli.printable import printable
from teal_cli.serve.refusal import Refusal, refusal_of
from teal_cli.serve.request import Asked
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import DENSE, Setting, check_target
from teal_cli.store.models import DEMO, ModelRef

_DENSE_TAG = "dense"
_NO_DRAFT = "none"
_REMEMBERED = 64  # conversations' tokens


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as the session takes it."""

    asked: Asked
    text: str | None  # the prompt's, where it comes from a template
    tokens: tuple[int, ...]
    sampling: Sampling
    setting: Setting
    limits: Limits
    drafts: bool = False  # the model checks guesses


@dataclass
class Model:
    """A model, and what holds where a request does not say."""

    name: str  # as requests call it
    fingerprint: str
    tokenizer: Any
    template: ChatTemplate | None
    eos_token_ids: Sequence[int]
    stop_texts: Sequence[str]
    sampling: Mapping[str, Any]  # fields of `Sampling`
    sparsity: float
    profile: Profile | None
    method: str | None
    max_length: int  # positions
    max_tokens: int
    think_tokens: int
    draft: str | None = None  # what guesses for dense requests, as --draft has it
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._settings: dict[float, Setting] = {0.0: DENSE}
        self._lock = Lock()
        self._stop_token_ids = stop_token_ids(self.eos_token_ids, self.tokenizer, self.template)

    @property
    def ids(self) -> tuple[str, ...]:
        """The names that a list of models shows."""
        ids = [self.name]
        if self.profile is not None:
            ids += [f"{self.name}:{self.sparsity:g}"] if self.sparsity else []
            ids.append(f"{self.name}:{_DENSE_TAG}")
        return tuple(ids)

    def described(self, name: str) -> dict[str, Any]:
        """OpenAI's object for a model.

        Raises:
            Refusal: it is not this one.
        """
        self._tagged(name)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "teal"}

    def prepare(self, asked: Asked) -> Prepared:
        """Check a request against the model, and make its tokens. Any thread may call it.

        Raises:
            Refusal: the model, its template or its context does not take it.
        """
        sparsity = self._sparsity(asked)
        try:
            setting = self.setting(sparsity)
            with self._lock:
                text, tokens = self._prompt(asked)
        except TealError as error:
            raise refusal_of(error) from None
        if len(tokens) >= self.max_length:
            raise Refusal(
                f"This model's maximum context length is {self.max_length} tokens, and the prompt"
                f" has {len(tokens)}. Shorten it.",
                param="prompt" if text is None else "messages",
                code="context_length_exceeded",
            )
        limits = Limits(
            min(asked.max_tokens or self.max_tokens, self.max_length),
            self.think_tokens,
            self._stop_token_ids,
            (*self.stop_texts, *asked.stop),
        )
        sampling = Sampling(**{**self.sampling, **asked.sampling})
        drafts = self._drafts(asked, setting)
        return Prepared(asked, text, tuple(tokens), sampling, setting, limits, drafts)

    def remember(self, prepared: Prepared, said: str, answered: Sequence[int]) -> None:
        """Keep an answer's tokens for the prompt that goes on from it."""
        if prepared.text is not None and self._prompts is not None:
            with self._lock:
                self._prompts.remember(prepared.text, said, prepared.tokens, answered)

    def setting(self, sparsity: float) -> Setting:
        """The setting of a target, the same object each time.

        Raises:
            Refusal: there are no thresholds for it.
            TealError: the method does not reach it.
        """
        if sparsity not in self._settings:
            if self.profile is None:
                raise Refusal(
                    "this model is served dense: it has no thresholds. `teal calibrate` makes"
                    " them, and `teal serve` takes them at its next start.",
                    param="sparsity",
                    code="unsupported_value",
                )
            if len(self._settings) > 32:  # a client that tries them all
                self._settings = {0.0: DENSE}
            self._settings[sparsity] = self.profile.setting(sparsity, self.method)
        return self._settings[sparsity]

    @cached_property
    def _prompts(self) -> Prompts | None:
        if self.template is None:
            return None
        return Prompts(self.tokenizer, self.template, remembered=_REMEMBERED)

    def _prompt(self, asked: Asked) -> tuple[str | None, Sequence[int]]:
        if asked.messages:
            if self._prompts is None:
                raise Refusal(
                    "this model has no chat template, so it continues texts: /v1/completions",
                    param="messages",
                )
            check_think(self.template, asked.think)
            return self._prompts.encode(asked.messages, asked.think)
        prompt = asked.prompt
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
            if not tokens:
                raise Refusal("the prompt is empty", param="prompt")
            return None, tokens
        assert prompt is not None
        size = len(self.tokenizer)
        if not all(0 <= token < size for token in prompt):
            raise Refusal(f"the prompt's tokens must be from 0 to {size - 1}", param="prompt")
        return None, prompt

    def _sparsity(self, asked: Asked) -> float:
        """The target that a request names, by its model's tag or by its own field."""
        tagged = self._tagged(asked.model)
        if asked.sparsity is None:
            return self.sparsity if tagged is None else tagged
        if tagged is not None and tagged != asked.sparsity:
            raise Refusal(
                f"model says sparsity {tagged:g}, sparsity says {asked.sparsity:g}: leave one out",
                param="sparsity",
            )
        return asked.sparsity

    def _drafts(self, asked: Asked, setting: Setting) -> bool:
        """Whether guesses are checked: where a request says so, or may have them and says nothing.

        Raises:
            Refusal: it says so, and cannot have them.
        """
        wrong = ""
        if setting.thresholds is not None:
            wrong = "a model that checks guesses has to be dense: leave sparsity or draft out"
        elif asked.logprobs is not None:
            wrong = "log probabilities are not noted where guesses are checked: leave one out"
        if asked.draft is None:
            return self.draft is not None and not wrong
        if asked.draft == _NO_DRAFT:
            return False
        if asked.draft != self.draft:
            here = "nothing guesses here, but with `teal serve --draft`"
            raise Refusal(
                here if self.draft is None else f"draft is {self.draft!r} here, or {_NO_DRAFT!r}",
                param="draft",
                code="unsupported_value",
            )
        if wrong:
            raise Refusal(wrong, param="draft")
        return True

    def _tagged(self, name: str) -> float | None:
        """The sparsity in `name:0.4`; None in `name`.

        Raises:
            Refusal: it is the name of another model.
        """
        if name == self.name:
            return None
        before, _, tag = name.rpartition(":")
        try:
            value = 0.0 if tag == _DENSE_TAG else float(tag)
            check_target(value)
        except (ValueError, TealError):
            before = ""
        if before != self.name:
            raise Refusal(
                f"there is no model {name[:100]!r} here. There are: {', '.join(self.ids)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return value


def served_name(ref: ModelRef, given: str | None) -> str:
    """What requests call a model: as the user does, but a local one by its last name alone."""
    if ref.path is not None:
        return printable(
            os.fsencode(ref.path.stem if ref.kind == "gguf" else ref.path.name).decode(
                "utf-8", "replace"
            )
        )
    if given is not None:
        return given
    return "demo" if ref.name == DEMO else ref.name
