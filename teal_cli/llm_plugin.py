"""teal's models in the `llm` program: `llm -m teal/demo "…"`.

`llm` finds `register_models` by the package's entry point. Nothing is loaded before an answer is
asked for; then the model stays, and with it the keys of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import llm

from teal_cli.errors import TealError


class Options(llm.Options):
    """What can be set by `-o`; what is not is as in `teal chat`."""

    sparsity: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int = 512


class Teal(llm.Model):
    """One of teal's models, by the name that `teal chat` takes."""

    can_stream = True
    Options = Options

    def __init__(self, name: str) -> None:
        self.model_id = f"teal/{name}"
        self._name = name

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        """The answer as it comes; `llm` puts the pieces together where it is not to stream."""
        from teal_cli.inference.conversation import Conversation
        from teal_cli.inference.sampling import Sampler, Sampling
        from teal_cli.inference.text_stream import Text

        turns = [] if conversation is None else conversation.responses
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.prompt.prompt})
            messages.append({"role": "assistant", "content": turn.text()})
        own, options = self._parts, prompt.options
        chosen = {name: getattr(options, name) for name in ("temperature", "top_p", "seed")}
        given = {name: value for name, value in chosen.items() if value is not None}
        try:
            own["session"].use(own["setting"](options.sparsity))
            sampler = Sampler(Sampling(**{**own["sampling"], **given}))
            talk = Conversation(own["session"], own["tokenizer"], sampler, **own["ends"])
            talk.restore(messages)
            for step in talk.answer(prompt.prompt, max_new_tokens=options.max_tokens):
                if isinstance(step, Text) and not step.thinking:
                    yield step.text
        except TealError as error:
            raise llm.ModelError(f"{error.message}. {error.hint or ''}".strip()) from None
        stats = step.stats  # type: ignore[union-attr]  # the last step is the end
        response.set_usage(input=stats.prompt_tokens, output=stats.new_tokens)

    @cached_property
    def _parts(self) -> dict[str, Any]:
        from teal_cli import pipeline
        from teal_cli.inference.chat_template import ChatTemplate
        from teal_cli.inference.defaults import chat_defaults, sampling_defaults, stop_texts
        from teal_cli.inference.ends import stop_token_ids
        from teal_cli.inference.session import Session
        from teal_cli.progress import Silent
        from teal_cli.sparsity.setting import DENSE
        from teal_cli.store import models

        ref, reporter = models.resolve(self._name), Silent()
        checkpoint = pipeline.ensure_checkpoint(ref, thresholds="quick", reporter=reporter)
        profile = pipeline.ensure_profile(checkpoint, quick=True, reporter=reporter)
        defaults, authors = chat_defaults(checkpoint.config), checkpoint.generation_defaults()
        tokenizer = checkpoint.tokenizer()
        template = ChatTemplate.of(tokenizer)
        ends = stop_token_ids(checkpoint.eos_token_ids, tokenizer, template)
        length = min(checkpoint.config.context_length, 8192)

        def setting(sparsity: float | None) -> Any:
            target = defaults.sparsity if sparsity is None else sparsity
            return profile.setting(target) if target else DENSE

        return {
            "session": Session(checkpoint.load(), max_length=length),
            "tokenizer": tokenizer,
            "setting": setting,
            "sampling": sampling_defaults(authors, defaults),
            "ends": {"stop_token_ids": ends, "stop_texts": stop_texts(authors)},
        }


@llm.hookimpl
def register_models(register: Callable[[llm.Model], None]) -> None:
    """Offer the demo model, and every model that teal has stored."""
    from teal_cli.model import inventory

    for name in dict.fromkeys(["demo", *inventory.names()]):
        register(Teal(name))
