"""Tokenizers rebuilt from GGUF metadata, against tokenizers made as the models' own are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.gguf_tokenizer import write_tokenizer

TEXT = "  2024 is the  year,\n\n it's  x1+1 = 23; Zwölf 你好 🙂\t<|im_end|> e\u0301"


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ Ġ", "Ġ t", "t h", "Ġt h", "2 0", "2 4", "20 2", "Ġ 2", "Ġ i", "Ġi s", "Ċ Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokens += ["".join(merge.split()) for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def load(folder: Path, metadata: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(folder, metadata, 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["ĠĠ", "2", "0", "2", "4", "Ġis"]),  # the spaces before a digit merge
        ("default", ["Ġ", "Ġ", "20", "24", "Ġis"]),
        ("qwen2", ["Ġ", "Ġ", "2", "0", "2", "4", "Ġis"]),
        ("llama-bpe", ["<|im_start|>", "Ġ", "Ġ", "202", "4", "Ġis"]),  # by threes, after BOS
    ],
)
def test_pre_tokenizers_cut_digits_their_own_way(
    pre: str, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = load(tmp_path, byte_level(pre))
    assert pieces(tokenizer, "  2024 is") == expected
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    composed = TEXT.replace("e\u0301", "é") if pre == "qwen2" else TEXT
    assert tokenizer.decode(ids) == composed
    assert 2 in ids  # the control token is one token
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == 512


def test_chat_template_and_bos(tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}{{ eos_token }}"
    more = {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True}
    tokenizer = load(tmp_path, byte_level("smollm", **more))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|im_end|>"
    assert pieces(tokenizer, "i") == ["<|im_start|>", "i"]
    more["tokenizer.ggml.add_bos_token"] = False
    assert pieces(load(tmp_path, byte_level("llama-bpe", **more)), "i") == ["i"]


def sentencepiece() -> dict[str, Any]:
    words = ["▁t", "he", "▁the", "▁", "t", "h", "e", "é", "▁▁", "hé", "1", "▁1"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_merges_fall_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, sentencepiece())
    assert pieces(tokenizer, "the hé 1") == ["<s>", "▁the", "▁", "hé", "▁1"]
    assert pieces(tokenizer, "ö") == ["<s>", "▁", "<0xC3>", "<0xB6>"]
    for text in ("the  thé 11 ö 你\n", " the"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_sentencepiece_equals_the_class_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    from teal_cli.model.gguf_tokenizer import _merges

    metadata = sentencepiece()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = _merges(tokens, metadata["tokenizer.ggml.scores"])
    theirs = LlamaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)
    ours = load(tmp_path, metadata)
    # Not at a leading space: SentencePiece, and so Llama 2's own file, puts one more before it.
    for text in ("the  hé\n1", "ö the", "the the  1é"):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text, add_special_tokens=False)["input_ids"] == expected


def test_refusals(tmp_path: Path) -> None:
    for metadata, error in (
        ({}, TealError),
        ({**byte_level("smollm"), "tokenizer.ggml.model": "bert"}, UnsupportedError),
        (byte_level("tekken"), UnsupportedError),
    ):
        with pytest.raises(error):
            write_tokenizer(tmp_path, metadata, 512)
    assert not list(tmp_path.iterdir())
