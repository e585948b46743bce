"""The tokens that end an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from teal_cli.errors import TealError
from teal_cli.inference.chat_template import ChatTemplate

_MARK = "tealanswer"  # stands for an answer where a template is looked at

# Ends of a turn, a message or a text, by the names that llama.cpp (src/llama-vocab.cpp) knows.
_NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    "<｜end▁of▁sentence｜>",
)
# Some of them are also words of HTML or of prose, which a vocabulary may hold as text.
_SURE = ("<|", "<｜")
# Where all of the first are there, the second only separates the parts of an answer.
_NO_ENDS = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|flush|>", "<|calls|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)


def stop_token_ids(
    eos_token_ids: Iterable[int], tokenizer: Any, template: ChatTemplate | None
) -> frozenset[int]:
    """Every token that ends an answer.

    The checkpoint's and the tokenizer's ends of a text; for a chat also what the template puts
    after an answer, and each token of a name that is known to end one: some configs leave out the
    token that ends a turn, and name only the one that ends a text.

    Args:
        eos_token_ids: the checkpoint's.
        tokenizer: a transformers tokenizer.
        template: None for a base model, which ends at the end of a text alone.
    """
    ends = {*eos_token_ids, tokenizer.eos_token_id}
    if template is not None:
        ends |= _ends_of_turn(tokenizer, template) | _named(tokenizer)
    return frozenset(ends - {None})


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that stand for no text of their own."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def _named(tokenizer: Any) -> set[int]:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    found = {
        name: vocabulary[name]
        for name in _NAMES
        if name in vocabulary and (vocabulary[name] in added or name.startswith(_SURE))
    }
    for others, name in _NO_ENDS:
        if others <= found.keys():
            found.pop(name, None)
    return set(found.values())


def _ends_of_turn(tokenizer: Any, template: ChatTemplate) -> set[int]:
    """The first special and the first added token that the template puts after an answer."""
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _MARK}]
    try:
        text = template.render(turn, add_generation_prompt=False)
    except TealError:  # explained with the first prompt
        return set()
    _, *rest = re.split(_MARK, text, flags=re.IGNORECASE)  # a template may change the case
    after = tokenizer.encode(rest[-1], add_special_tokens=False) if rest else []
    # Added tokens may be text, as runs of spaces are in some vocabularies.
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    kinds = (special_token_ids(tokenizer), added)
    return {next(token for token in after if token in kind) for kind in kinds if kind & {*after}}
