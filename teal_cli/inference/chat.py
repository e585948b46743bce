"""A conversation: messages to tokens, an answer as a stream of text, sensible defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from teal_cli.errors import TealError, UsageError
from teal_cli.inference.detokenizer import Detokenizer
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.sampling import Sampler
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig

# Tokens before an answer that tell the detokenizer whether its first word follows a space.
_CONTEXT_TOKENS = 4

# Below this size a model loses the thread sooner, to sparsity as to temperature.
_SMALL_MODEL_WEIGHTS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class ChatDefaults:
    """What chat does where neither the user nor the model's author says otherwise."""

    sparsity: float
    temperature: float
    top_p: float


def chat_defaults(config: ModelConfig) -> ChatDefaults:
    """Defaults by size.

    40 % costs Llama-2-7B 3 % of perplexity and Llama-3-8B 6 % (TEAL, arXiv 2408.14690, table 1);
    on SmolLM2-135M it costs 17 to 20 % and 25 % costs 3 %, so a small model gets 25 %. 0.2 is
    the temperature that SmolLM2's authors use; 0.7 is what larger chat models are tuned for.
    """
    per_layer = sum(inputs * outputs for inputs, outputs in config.projection_shapes.values())
    if per_layer * config.num_hidden_layers < _SMALL_MODEL_WEIGHTS:
        return ChatDefaults(sparsity=0.25, temperature=0.2, top_p=0.9)
    return ChatDefaults(sparsity=0.4, temperature=0.7, top_p=0.9)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, ready to be shown."""

    text: str


class Conversation:
    """Turns of user and model, over one session whose cache is kept between turns.

    With a chat template the model sees the whole conversation. Without one it is a base model:
    it continues each text that it is given, and remembers nothing.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        sampler: Sampler,
        *,
        stop_token_ids: Collection[int],
        system: str | None = None,
    ) -> None:
        """Start a conversation.

        Args:
            session: decodes; its tokens belong to the conversation from now on.
            tokenizer: a transformers tokenizer.
            sampler: chooses the tokens.
            stop_token_ids: end an answer.
            system: a message that comes before the first turn.

        Raises:
            UsageError: a system message for a model without a chat template.
        """
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if system is not None and not self.has_template:
            raise UsageError(
                "this model has no chat template, so it takes no system message",
                hint="Leave --system out: a base model continues the text of the prompt.",
            )
        self._session = session
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._stop_token_ids = frozenset(stop_token_ids)
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def answer(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[Text | Finish]:
        """Answer one turn; what was said of an interrupted answer stays in the conversation.

        Args:
            prompt: the user's turn, or the text to continue.
            max_new_tokens: where an answer is cut off.
            interrupted: asked between tokens; the answer ends once it says True.

        Yields:
            `Text` whenever there is more to show, then one `Finish`.

        Raises:
            UsageError: the conversation does not fit into the context; the turn is forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": prompt}]
        tokens = self._encode(messages) if self.has_template else self._tokenizer.encode(prompt)
        if not tokens:
            raise UsageError("the prompt is empty")
        detokenizer = Detokenizer(self._tokenizer, tokens[-_CONTEXT_TOKENS:])
        said = ""
        steps = generate(
            self._session,
            tokens,
            self._sampler,
            max_new_tokens=max_new_tokens,
            stop_token_ids=self._stop_token_ids,
            interrupted=interrupted,
        )
        for step in steps:
            piece = detokenizer.add(step.id) if isinstance(step, Token) else detokenizer.finish()
            if self.has_template and not said:
                piece = piece.lstrip()  # SentencePiece models begin every answer with a space
            said += piece
            if piece:
                yield Text(piece)
            if isinstance(step, Finish):
                if self.has_template:
                    self.messages = [*messages, {"role": "assistant", "content": said}]
                yield step

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise TealError(
                f"the model's chat template does not accept this conversation: {error}",
                hint="Some models take no --system message.",
            ) from None
        # The template has written the special tokens, so the tokenizer must not add them again.
        return self._tokenizer.encode(text, add_special_tokens=False)


def sampling_defaults(
    generation_defaults: Mapping[str, Any], defaults: ChatDefaults
) -> dict[str, Any]:
    """Temperature, top-k and top-p: the model's own where its author chose any, else ours.

    Args:
        generation_defaults: the content of generation_config.json, perhaps empty.
        defaults: what to fall back on.
    """
    names = ("temperature", "top_k", "top_p")
    chosen = {n: generation_defaults[n] for n in names if generation_defaults.get(n) is not None}
    if generation_defaults.get("do_sample") and chosen:
        return {"temperature": 1.0, **chosen}
    return {"temperature": defaults.temperature, "top_p": defaults.top_p}
