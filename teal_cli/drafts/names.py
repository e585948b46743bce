"""What `--draft` says: which of text, the model itself and another model guess tokens for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from teal_cli.errors import MissingError, UsageError
from teal_cli.model.quantization import QUANTIZATIONS, quantization
from teal_cli.store import models
from teal_cli.store.models import ModelRef
from teal_cli.suggestions import closest

_LOOKUP, _SELF = "lookup", "self"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `--draft` asks for; `model` is "self" or a model's name."""

    lookup: bool
    model: str | None
    quantize: str | None

    @property
    def name(self) -> str:
        """What was asked for."""
        return ",".join(filter(None, (_LOOKUP if self.lookup else "", self.model_name)))

    @property
    def model_name(self) -> str:
        """The part of it that is a model; empty without one."""
        return ":".join(filter(None, (self.model, self.quantize)))

    @property
    def is_self(self) -> bool:
        """Whether the model guesses for itself."""
        return self.model == _SELF

    @staticmethod
    def parse(text: str, sparsity: float | None = None) -> Wanted:
        """What a list such as "lookup,self:int8" means.

        Args:
            text: the list.
            sparsity: of the guesses, where one is asked for.

        Raises:
            UsageError: it names nothing, more than one model, or a form of it that is none, or
                text is to be sparse.
        """
        entries = dict.fromkeys(_lower(e.strip()) for e in text.split(",") if e.strip(" :"))
        named = [entry for entry in entries if entry != _LOOKUP]
        if not entries:
            raise UsageError("--draft names nothing", hint="Say lookup, self or a model.")
        if len(named) > 1:
            raise UsageError(
                f"--draft takes one model, not {' and '.join(named)}",
                hint="lookup goes with any of them, as in lookup,self.",
            )
        if not named and sparsity:
            raise UsageError(
                "with --draft lookup there is nothing to make sparse: text guesses, and the model"
                " that checks guesses is dense",
                hint="The rows that several tokens need together are nearly all."
                " --draft lookup,self --sparsity 0.4 guesses with the sparse model too.",
            )
        if not named:
            return Wanted(True, None, None)
        name, colon, form = named[0].rpartition(":")
        if name == _LOOKUP:
            raise UsageError(
                "--draft lookup is text, which no integers make smaller",
                hint=f"Leave out :{form}, or say self:{form}.",
            )
        if colon and (form in QUANTIZATIONS or name == _SELF):
            quantization(form)  # or it is refused by its name
            if not name:
                raise UsageError(f"--draft names no model before :{form}", hint="As in self:int8.")
            return Wanted(_LOOKUP in entries, name, form)
        return Wanted(_LOOKUP in entries, named[0], None)

    def guessing_for(self, ref: ModelRef) -> Wanted:
        """The same where it guesses for a model, whose own name is "self" too.

        Nothing of the two has to be here.

        Raises:
            MissingError: there is no such model.
        """
        if self.model is None or self.is_self:
            return self
        try:
            own = models.resolve(self.model)
        except MissingError as error:
            near = closest(self.model, (_LOOKUP, _SELF))
            meant = f"Did you mean {near}? " if near else "--draft takes lookup and self too. "
            raise MissingError(error.message, hint=f"{meant}{error.hint or ''}") from None
        return replace(self, model=_SELF) if own == ref else self


def _lower(entry: str) -> str:
    """An entry with the words that name no model in lower case."""
    word, colon, form = entry.partition(":")
    return f"{word.lower()}{colon}{form}" if word.lower() in (_LOOKUP, _SELF) else entry
