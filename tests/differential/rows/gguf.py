"""What a GGUF file says of itself besides its model, and how its bytes are laid out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from differential.comparisons import Refused, Tensors, Tokens
from differential.rows.text import INSTRUCTIONS
from differential.situations import Situation, as_gguf
from differential.vocabularies import byte_level, sentencepiece
from tokenizers import Tokenizer

from teal_cli.errors import TealError


def _file(name: str, keys: Mapping[str, Any]) -> Situation:
    return Situation(f"GGUF: {name}", Tensors(), (as_gguf(keys),), families=("llama", "qwen2"))


def _bytes_alone() -> Tokenizer:
    tokenizer = byte_level()
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = []
    return Tokenizer.from_str(json.dumps(state))


ROWS = (
    *(
        _file(f"tensors at multiples of {size} bytes", {"general.alignment": size})
        for size in (8, 16, 64, 4096)
    ),
    _file("a file type that its tensors are not of", {"general.file_type": 2}),
    _file("another number of tokens in a key", {"{arch}.vocab_size": 32000}),
    _file(
        "numbers given for each layer",
        {
            "{arch}.attention.head_count": [4, 4],
            "{arch}.attention.head_count_kv": [2, 2],
            "{arch}.feed_forward_length": [112, 112],
        },
    ),
    Situation(
        "GGUF: no beginning of a text",
        Tokens(INSTRUCTIONS),
        (as_gguf({"tokenizer.ggml.add_bos_token": False}),),
        vocabulary=lambda: sentencepiece(begins=False),
    ),
    Situation(
        "GGUF: no merges",
        Refused(TealError, ("merges",)),
        (as_gguf({"tokenizer.ggml.merges": None}),),
        vocabulary=lambda: byte_level(special_from=1000),
    ),
    Situation(
        "GGUF: no merges, and no words",
        Tokens(("the 12", "ö<|im_end|>")),
        (as_gguf(),),  # the writer leaves an empty list out
        vocabulary=_bytes_alone,
        transformers="5.18",
    ),
    *(
        Situation(
            f"GGUF: a {key} for some tokens only",
            Refused(TealError, (f"{key} of 3",)),
            (as_gguf({f"tokenizer.ggml.{key}": few}),),
            vocabulary=sentencepiece,
        )
        for key, few in (("token_type", [1, 1, 1]), ("scores", [0.0, 0.0, 0.0]))
    ),
    Situation(
        "GGUF: SentencePiece without scores",
        Refused(TealError, ("scores of 0",)),
        (as_gguf({"tokenizer.ggml.scores": None}),),
        vocabulary=sentencepiece,
    ),
    *(
        Situation(
            f"GGUF: {key} of {value!r}", Refused(TealError, (said,)), (as_gguf({key: value}),)
        )
        for key, value, said in (
            ("tokenizer.ggml.eos_token_id", "2", "eos_token_id is '2'"),
            ("tokenizer.ggml.tokens", [1, 2, 3], "tokens are no texts"),
            ("tokenizer.ggml.merges", [1, 2], "merges are no texts"),
        )
    ),
    Situation(
        "GGUF: a text for a number",
        Refused(TealError, ("context_length",)),
        (as_gguf({"{arch}.context_length": "512"}),),
    ),
)
