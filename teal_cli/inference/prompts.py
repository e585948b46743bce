"""Messages to the tokens of a prompt: those that an answer was said with, where it is known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from teal_cli.inference.chat_template import ChatTemplate, Message
from teal_cli.inference.ends import special_token_ids
from teal_cli.printable import printable


class Prompts:
    """Renders messages by the template, and remembers the tokens of the last conversations.

    The same text can be split otherwise than it was said, and then its keys and values would be
    computed anew.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, *, remembered: int = 1) -> None:
        """Start without memory.

        Args:
            tokenizer: a transformers tokenizer.
            template: the one to render with.
            remembered: conversations to remember, the last ones.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._remembered = remembered
        self._special = special_token_ids(tokenizer)
        self._seen: OrderedDict[str, list[int]] = OrderedDict()

    def encode(
        self, messages: Sequence[Message], think: bool | None = None
    ) -> tuple[str, list[int]]:
        """The text that the template makes, and its tokens.

        Raises:
            TealError: as `ChatTemplate.render`.
        """
        text = self._template.render(messages, think=think)
        # The template has written the special tokens, so the tokenizer must not add them again.
        known = max((seen for seen in self._seen if text.startswith(seen)), key=len, default=None)
        if known is not None:
            rest = self._tokenizer.encode(text[len(known) :], add_special_tokens=False)
            # Only a special token is sure to be a token of its own wherever the text is cut.
            if rest and rest[0] in self._special:
                return text, [*self._seen[known], *rest]
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    def remember(
        self, text: str, said: str, prompt: Sequence[int], answered: Sequence[int]
    ) -> None:
        """Keep the tokens of an answer to a prompt that `encode` made.

        They must be all of what was said and no more: no special token, thinking or stop text.

        Args:
            text: the prompt's.
            said: the answer's.
            prompt: the prompt's tokens.
            answered: the answer's.
        """
        if printable(self._tokenizer.decode(answered)).lstrip() == said:
            self._seen[text + said] = [*prompt, *answered]
            self._seen.move_to_end(text + said)
            if len(self._seen) > self._remembered:
                self._seen.popitem(last=False)
