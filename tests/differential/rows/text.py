"""From text to tokens, and from tokens to text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from differential.answers import Answer, Stream
from differential.comparisons import EqualOrRefused, Tokens
from differential.situations import Situation, as_gguf, on_folder, only_for_teal, path
from differential.vocabularies import (
    LLAMA_3,
    QWEN_2,
    SPECIAL,
    TEKKEN,
    byte_level,
    sentencepiece,
    write_sentencepiece_model,
)
from model.edits import edit_json, remove
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

INSTRUCTIONS = ("<s>[INST] hi [/INST]", " hi", "hi", "<s>hi</s><s>[INST] hi", "the  thé 1\n你 ö")
WORDS = ("12345 the", " the 1", "a.bar(x)", "aBAb//\n\n")
SCRIPTS = (
    "Grüße, naïve café; Привет, мир; Γειά σου; שלום עולם; مرحبا بالعالم; नमस्ते दुनिया; হ্যালো",
    "ಹಲೋ; สวัสดีชาวโลก; 你好，世界; こんにちは世界; 안녕하세요; გამარჯობა",
    "ሰላም ልዑል; வணக்கம்; ສະບາຍດີ; မင်္ဂလာပါ; Բարեւ; ជំរាបសួរ; ආයුබෝවන්",
    "👍🏽 👩‍👩‍👧 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🇩🇪🇫🇷 e\u0301\u0302 \u200d\ufe0f 😀😀😀",
)
# Llama 3's 256 special tokens begin at 128000; those that a chat needs are the seventh to tenth.
_RESERVED = (
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
_named = partial(edit_json, "tokenizer_config.json")


def _begins_with(token: str, tokenizer: Tokenizer) -> Tokenizer:
    from tokenizers.processors import TemplateProcessing

    index = tokenizer.token_to_id(token)
    tokenizer.post_processor = TemplateProcessing(f"{token} $A", special_tokens=[(token, index)])
    return tokenizer


def _beside(
    name: str, vocabulary: Callable[[], Tokenizer], what: str = "", **flags: Any
) -> Situation:
    """tokenizer.json beside a class that would build another tokenizer."""
    texts = WORDS if vocabulary().token_to_id("</s>") is None else INSTRUCTIONS
    return Situation(
        f"tokenizer.json beside {name}{what}",
        Tokens(texts),
        (on_folder(_named(tokenizer_class=name, **flags)),),
        vocabulary=vocabulary,
    )


def _vocabulary_and_merges(folder: Path) -> None:
    """The two files that GPT-2 and Qwen 2 were first published with, in place of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))


def _split_by_metaspace(**scheme: object) -> Tokenizer:
    tokenizer = sentencepiece(metaspace=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
    return tokenizer


def _with_a_mask() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, special=True)])
    return tokenizer


def _compatible() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def _with_normalized_tokens() -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    tokenizer.add_tokens([AddedToken("word", normalized=True, single_word=True)])
    return tokenizer


TOKENIZERS = (
    Situation("byte-level", Tokens()),
    Situation("SentencePiece", Tokens(INSTRUCTIONS), vocabulary=sentencepiece),
    # The legacy flag has a say only where there is no tokenizer.json.
    _beside("LlamaTokenizer", sentencepiece, ", no longer legacy", legacy=False),
    _beside("LlamaTokenizer", partial(sentencepiece, metaspace=True), ", legacy", legacy=True),
    _beside("LlamaTokenizerFast", sentencepiece, add_prefix_space=False),
    _beside("CodeLlamaTokenizer", sentencepiece),
    _beside("GemmaTokenizer", sentencepiece),
    _beside("LlamaTokenizer", partial(byte_level, split=LLAMA_3), ", byte-level"),
    _beside("Qwen2Tokenizer", partial(byte_level, split=LLAMA_3)),
    _beside("GPT2Tokenizer", partial(byte_level, digits=True)),
    _beside("MadeUpTokenizer", byte_level),
    Situation(
        "spaces marked at every word",
        Tokens(INSTRUCTIONS),
        (on_folder(_named(tokenizer_class="LlamaTokenizer")),),
        vocabulary=partial(_split_by_metaspace, prepend_scheme="always", split=True),
    ),
    Situation(
        "no space before the first word",
        Tokens(INSTRUCTIONS),
        (on_folder(_named(tokenizer_class="LlamaTokenizer")),),
        vocabulary=partial(_split_by_metaspace, prepend_scheme="never", split=False),
    ),
    Situation("no tokenizer_config.json", Tokens(), (on_folder(remove("tokenizer_config.json")),)),
    Situation(
        "added tokens that are not flagged special",
        Tokens(("a<tool>b", "<tool> x <tool>")),
        vocabulary=partial(byte_level, plain=("<tool>", "</tool>")),
    ),
    Situation(
        "a special token's own id in tokenizer_config.json",
        Tokens(("a<|extra|>b",)),
        (
            on_folder(
                _named(
                    additional_special_tokens=["<|extra|>"],
                    tokenizer_class="PreTrainedTokenizerFast",
                )
            ),
        ),
        vocabulary=partial(byte_level, special=(*SPECIAL, "<|extra|>")),
    ),
    Situation(
        "vocab.json and merges.txt alone",
        Tokens(),
        (
            on_folder(
                _vocabulary_and_merges,
                _named(tokenizer_class="Qwen2Tokenizer"),
                remove("tokenizer.json"),
            ),
        ),
        families=("qwen2",),
    ),
    Situation(
        "an added token that takes the spaces around it",
        Tokens(("a <mask>  b", "a<mask>b", "the<mask> the")),
        vocabulary=_with_a_mask,
    ),
    Situation("characters made compatible", Tokens(("ﬁ ①② Ａ e\u0301",)), vocabulary=_compatible),
    Situation(
        "added tokens that are looked for after normalising",
        Tokens(("a<tool>b <tool>", "word wordy aword")),
        vocabulary=_with_normalized_tokens,
    ),
    Situation(
        "a vocabulary smaller than the embedding",
        Tokens(),
        families=("llama", "qwen2"),
        model={"vocab_size": 320},
    ),
    Situation(
        "tokenizer.model alone",
        EqualOrRefused(Tokens(INSTRUCTIONS), ("sentencepiece", "tokenizer.json")),
        (
            only_for_teal(  # the oracle is the tokenizer.json of the same vocabulary
                write_sentencepiece_model,
                _named(tokenizer_class="LlamaTokenizer"),
                remove("tokenizer.json"),
            ),
        ),
        vocabulary=sentencepiece,
    ),
)

GGUF_PRE_TOKENIZERS = tuple(
    Situation(
        f"GGUF's pre-tokenizer {pre}",
        Tokens(),
        (as_gguf(pre=pre),),
        vocabulary=vocabulary,
        transformers=needed,
    )
    for pre, vocabulary, needed in (
        ("gpt-2", byte_level, None),
        ("default", byte_level, None),
        ("smollm", partial(byte_level, digits=True), None),
        ("qwen2", partial(byte_level, split=QWEN_2, composed=True), None),
        ("deepseek-r1-qwen", partial(byte_level, split=QWEN_2), "5.18"),
        ("tekken", partial(byte_level, split=TEKKEN, ignore_merges=True), "5.18"),
        ("smaug-bpe", partial(byte_level, split=LLAMA_3), "5.18"),
    )
)
GGUF_TOKENIZERS = (
    Situation(
        "GGUF's pre-tokenizer llama-bpe",
        Tokens(),
        (as_gguf(pre="llama-bpe"),),
        vocabulary=lambda: _begins_with(
            "<|endoftext|>", byte_level(split=LLAMA_3, ignore_merges=True)
        ),
    ),
    Situation(
        "GGUF's SentencePiece",
        Tokens(INSTRUCTIONS),
        (as_gguf(),),
        families=("llama", "mistral"),
        vocabulary=sentencepiece,
    ),
    Situation(
        "GGUF's SentencePiece without a pre-tokenizer's name",
        Tokens(INSTRUCTIONS),
        (as_gguf(pre=None),),
        vocabulary=sentencepiece,
    ),
    Situation(
        "GGUF's SentencePiece without <s>",
        Tokens(INSTRUCTIONS),
        (as_gguf(),),
        vocabulary=partial(sentencepiece, begins=False),
    ),
    # Files of April 2024 name no pre-tokenizer; the markers at their ids tell whose they are.
    Situation(
        "GGUF's Llama 3 without a pre-tokenizer's name",
        Tokens(WORDS),
        (as_gguf(pre=None, quantization="F16"),),
        vocabulary=lambda: _begins_with(
            "<|begin_of_text|>",
            byte_level(
                special=("<|begin_of_text|>", "<|end_of_text|>", *_RESERVED),
                special_from=128000,
                split=LLAMA_3,
                ignore_merges=True,
            ),
        ),
        model={"hidden_size": 32, "intermediate_size": 32, "tie_word_embeddings": True},
    ),
    Situation(
        "GGUF's Qwen 2 without a pre-tokenizer's name",
        Tokens(WORDS),
        (as_gguf(pre=None, quantization="F16"),),
        families=("qwen2",),
        vocabulary=partial(byte_level, split=QWEN_2, composed=True, special_from=151643),
        model={"hidden_size": 32, "intermediate_size": 32, "tie_word_embeddings": True},
    ),
    Situation(
        "GGUF's SentencePiece without a space before the first word",
        Tokens(INSTRUCTIONS),
        (as_gguf({"tokenizer.ggml.add_space_prefix": False}),),
        vocabulary=partial(sentencepiece, prefix=False),
    ),
    Situation(
        "GGUF's vocabulary filled up",
        Tokens(),
        (as_gguf(pre="qwen2"),),
        families=("qwen2",),
        vocabulary=partial(byte_level, split=QWEN_2, composed=True),
        model={"vocab_size": 320},
    ),
    Situation(
        "GGUF's user-defined tokens",
        Tokens(("a<tool>b", "<tool> x <tool>")),
        (as_gguf(),),
        vocabulary=partial(byte_level, plain=("<tool>", "</tool>")),
    ),
)

_EMOJI = tuple(f"<0x{byte:02X}>" for byte in "😀".encode())


def _stream(name: str, same: Stream, vocabulary: Callable[[], Tokenizer] = byte_level) -> Situation:
    return Situation(name, same, vocabulary=vocabulary, model={"max_position_embeddings": 2048})


STREAMING = (
    _stream("bytes, twenty scripts", Stream(SCRIPTS)),
    _stream("bytes, random tokens", Stream(random=200)),
    _stream("byte fallback, twenty scripts", Stream(SCRIPTS), sentencepiece),
    _stream("byte fallback, random tokens", Stream(random=200), sentencepiece),
    _stream("byte fallback, marks before words", Stream(("the  INST 1", " 1")), sentencepiece),
    _stream(
        "byte fallback, spaces marked before the merges",
        Stream((*SCRIPTS, "the  INST 1", " 1"), random=50),
        partial(sentencepiece, metaspace=True),
    ),
    Situation(
        "an answer of emoji from byte tokens",
        Answer(max_new_tokens=12),
        vocabulary=sentencepiece,
        chain={**path("<0x0A>", *_EMOJI), **path(_EMOJI[-1], _EMOJI[0])},
    ),
    Situation(
        "an answer of emoji from bytes",
        Answer(max_new_tokens=12),
        chain={**path("Ċ", "ð", "Ł", "ĺ", "Ģ"), **path("Ģ", "ð")},
    ),
)

ROWS = (*TOKENIZERS, *GGUF_PRE_TOKENIZERS, *GGUF_TOKENIZERS, *STREAMING)
