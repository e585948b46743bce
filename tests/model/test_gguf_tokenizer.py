"""Tokenizers out of GGUF metadata, against the tokenizer.json that each was made from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from model.vocabularies import (
    LLAMA_3,
    QWEN_2,
    TEKKEN,
    TEXTS,
    byte_level,
    gguf_metadata,
    sentencepiece,
)
from packaging.version import Version
from reporters import Notes

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.gguf_tokenizer import write_tokenizer
from teal_cli.model.tokenizer import load_tokenizer
from teal_cli.progress import Silent

DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def load(folder: Path, metadata: dict[str, Any], reporter: Any = None) -> Any:
    write_tokenizer(folder, metadata, 512, reporter or Silent())
    return load_tokenizer(folder, "the model")


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


ROWS = {
    "gpt-2": {"split": None},
    "smollm": {"split": None, "digits": True},
    "refact": {"split": None, "digits": True},
    "llama-bpe": {"split": LLAMA_3, "ignore_merges": True},
    "smaug-bpe": {"split": LLAMA_3},
    "dbrx": {"split": LLAMA_3},
    "qwen2": {"split": QWEN_2, "composed": True},
    "deepseek-r1-qwen": {"split": QWEN_2, "special": DEEPSEEK},
    "tekken": {"split": TEKKEN, "ignore_merges": True},
}
# Those that transformers knows from 5.18 on.
NEWER = ("smaug-bpe", "dbrx", "deepseek-r1-qwen", "tekken")
OLD = Version(transformers.__version__) < Version("5.18")


def skip_if_unknown(pre: str) -> None:
    if pre in NEWER and OLD:
        pytest.skip("transformers before 5.18 has no table of pre-tokenizers")


@pytest.fixture(scope="module", params=ROWS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer.json's tokenizer, and the one from its GGUF metadata."""
    skip_if_unknown(request.param)
    oracle = byte_level(**ROWS[request.param])
    metadata = gguf_metadata(oracle, pre=request.param, add_bos_token=False)
    return oracle, load(tmp_path_factory.mktemp("gguf"), metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_each_pre_tokenizer(pair: Any, text: str) -> None:
    oracle, ours = pair
    ids = oracle.encode(text).ids
    assert ours(text)["input_ids"] == ids
    assert ours.decode(ids, skip_special_tokens=True) == oracle.decode(ids)
    assert ours.get_vocab() == oracle.get_vocab()


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ids_of_any_text(pair: Any, text: str) -> None:
    oracle, ours = pair
    assert ours(text)["input_ids"] == oracle.encode(text).ids


def test_a_whole_word_comes_before_any_merge(tmp_path: Path) -> None:
    metadata = gguf_metadata(byte_level(LLAMA_3), pre="llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"].append("Ġzebra")  # no merge leads there
    metadata["tokenizer.ggml.token_type"].append(1)
    assert pieces(load(tmp_path, metadata), " zebra") == ["Ġzebra"]
    skip_if_unknown("smaug-bpe")
    metadata["tokenizer.ggml.pre"] = "smaug-bpe"
    assert pieces(load(tmp_path, metadata), " zebra") != ["Ġzebra"]


@pytest.mark.parametrize("pre", [None, "default", ""])
@pytest.mark.parametrize(
    ("family", "size", "marks"),
    [
        ("llama-bpe", 128256, {128000: "<|begin_of_text|>", 128006: "<|start_header_id|>"}),
        ("qwen2", 151936, {151643: "<|endoftext|>", 151644: "<|im_start|>"}),
    ],
)
def test_an_unnamed_cut_is_known_by_the_vocabulary(
    pre: str | None, family: str, size: int, marks: dict[int, str], tmp_path: Path
) -> None:
    oracle = byte_level(**ROWS[family], special=(), plain=())
    metadata = gguf_metadata(oracle, add_bos_token=False, pre=pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.token_type"] += [5] * (size - len(tokens))
    tokens += [f"<fill{i}>" for i in range(len(tokens), size)]
    for i, token in marks.items():
        tokens[i] = token
    notes = Notes()
    ours = load(tmp_path, metadata, notes)
    for text in TEXTS[:2]:
        assert ours(text)["input_ids"] == oracle.encode(text).ids
    assert not notes.notes


def test_an_unnamed_cut_that_nobody_knows_is_said(tmp_path: Path) -> None:
    oracle, notes = byte_level(None), Notes()
    ours = load(tmp_path, gguf_metadata(oracle), notes)
    assert ours(TEXTS[0])["input_ids"] == oracle.encode(TEXTS[0]).ids  # as GPT-2
    assert "tokenizer.ggml.pre" in notes.notes[0]


def spm_of_llama_cpp(metadata: dict[str, Any], text: str) -> list[int]:
    """llama.cpp's way: the best score first, then the leftmost; bytes where there is no piece."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list(f" {text}".replace(" ", "▁")) if text else []
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        found = [(-scores[ids[pair]], at) for at, pair in enumerate(joined) if pair in ids]
        if not found:
            break
        at = min(found)[1]
        parts[at : at + 2] = [joined[at]]
    known = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [i for group in known for i in group]


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    metadata = gguf_metadata(sentencepiece())
    return metadata, load(tmp_path_factory.mktemp("gguf"), metadata)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(" theinr1é\n▁öあ🙂"), max_size=30))
def test_sentencepiece_is_as_llama_cpp_does_it(text: str, spaced: Any) -> None:
    metadata, ours = spaced
    assert ours(text, add_special_tokens=False)["input_ids"] == spm_of_llama_cpp(metadata, text)


@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("text", [*TEXTS, "<s>[INST] hi</s> the", "a<unk> b"])
def test_sentencepiece_is_as_its_tokenizer_json(spaced: bool, text: str, tmp_path: Path) -> None:
    oracle = sentencepiece(spaced=spaced)
    ours = load(tmp_path, gguf_metadata(oracle, add_space_prefix=spaced))
    ids = oracle.encode(text).ids
    assert ours(text)["input_ids"] == ids  # with BOS: the file does not say, llama.cpp adds it
    assert ours.decode(ids, skip_special_tokens=True) == oracle.decode(ids)
    assert ours.get_vocab() == oracle.get_vocab()


def test_a_vocabulary_without_bytes_has_its_unknown_token(tmp_path: Path) -> None:
    metadata = gguf_metadata(sentencepiece())
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [token.replace("<0x", "<no") for token in tokens]
    assert pieces(load(tmp_path, metadata), "i你i") == ["<s>", "▁i", "<unk>", "i"]


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("smollm", {}, ["i"]),
        ("smollm", {"add_bos_token": True}, ["<|im_start|>", "i"]),
        ("smollm", {"add_eos_token": True}, ["i", "<|im_end|>"]),
        ("llama-bpe", {}, ["<|im_start|>", "i"]),
        ("tekken", {}, ["<|im_start|>", "i"]),
        ("llama-bpe", {"add_bos_token": False}, ["i"]),
        ("llama-bpe", {"add_eos_token": True}, ["<|im_start|>", "i", "<|im_end|>"]),
    ],
)
def test_ends_of_a_text(
    pre: str, flags: dict[str, bool], expected: list[str], tmp_path: Path
) -> None:
    skip_if_unknown(pre)
    tokens = byte_level(None).get_vocab()
    ids = {"bos_token_id": tokens["<|im_start|>"], "eos_token_id": tokens["<|im_end|>"]}
    tokenizer = load(tmp_path, gguf_metadata(byte_level(None), pre=pre, **ids, **flags))
    assert pieces(tokenizer, "i") == expected
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 512


def test_a_token_with_a_role_is_special_whatever_its_type(tmp_path: Path) -> None:
    metadata = gguf_metadata(byte_level(None), pre="gpt-2")
    end = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    metadata |= {"tokenizer.ggml.eot_token_id": end}
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load(tmp_path, metadata)
    assert pieces(tokenizer, "a<|im_end|>") == ["a", "<|im_end|>"]
    assert tokenizer.decode([end], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({"": "plain"}, "plain"),
        ({"": "plain", ".tool_use": "tools"}, {"default": "plain", "tool_use": "tools"}),
        ({".tool_use": "tools"}, {"tool_use": "tools"}),
        ({}, None),
    ],
)
def test_templates(templates: dict[str, str], expected: Any, tmp_path: Path) -> None:
    more = {f"tokenizer.chat_template{name}": text for name, text in templates.items()}
    tokenizer = load(tmp_path, gguf_metadata(byte_level(None), pre="gpt-2") | more)
    assert tokenizer.chat_template == expected


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({}, TealError),
        ({"model": "bert"}, UnsupportedError),
        ({"pre": "of-tomorrow"}, UnsupportedError),
        ({"merges": ["a b c"]}, TealError),
        ({"tokens": ["a", "b" * 100_000]}, TealError),
    ],
)
def test_refusals(metadata: dict[str, Any], error: type[TealError], tmp_path: Path) -> None:
    whole = gguf_metadata(byte_level(None), pre="gpt-2") if metadata else {}
    with pytest.raises(error):
        write_tokenizer(
            tmp_path,
            whole | {f"tokenizer.ggml.{k}": v for k, v in metadata.items()},
            512,
            Silent(),
        )
    assert not list(tmp_path.iterdir())
