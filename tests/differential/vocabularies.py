"""Tokenizers as models ship them, made small: the files of a folder, and their form in GGUF."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tiny import CHAT_TEMPLATE
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# GGUF's token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# How text is cut before the merges, as the models' own tokenizer.json files say it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3 = _WORDS.replace("DIGITS", r"\p{N}{1,3}")
QWEN_2 = _WORDS.replace("DIGITS", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Merges over what the ways to cut differ in: digits, runs of spaces, punctuation, capitals.
MERGES = [
    "Ġ Ġ",
    "Ġ t",
    "h e",
    "Ġt he",
    "1 2",
    "12 3",
    "4 5",
    "123 45",
    "Ġ 1",
    "Ċ Ċ",
    ". b",
    ".b a",
    ".ba r",
    "( x",
    "' s",
    "A b",
    "a B",
    "Ċ /",
]
TEXTS = (
    "  12345 the  1 text.bar(x)\n\n it's  x1+1 = 23;",
    "Zwölf 你好 🙂\t<|im_end|> e\u0301 aBAb zq",
    " the",
    "//\n/ a\n\n\n  b",
)


def byte_level(
    *,
    split: str | None = None,
    digits: bool = False,
    composed: bool = False,
    ignore_merges: bool = False,
    special: tuple[str, ...] = SPECIAL,
    plain: tuple[str, ...] = (),
    special_from: int = 0,
) -> Tokenizer:
    """Byte-pair encoding over bytes: the special tokens, the bytes, then what they merge to.

    `split` cuts text where GPT-2's own way does not; `digits` stand alone (SmolLM2); `composed`
    is NFC (Qwen); `plain` are added tokens that are not flagged special. With `special_from`
    the special tokens come last, from this id on, behind tokens that no text makes.
    """
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    # No merge makes the last one: a tokenizer that ignores merges for whole words takes it.
    texts = [*bytes_, *("".join(merge) for merge in merges), "Ġzq"]
    fillers = [f"filler {index}" for index in range(special_from - len(texts))]
    tokens = [*texts, *fillers, *special] if fillers else [*special, *plain, *texts]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    own = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    alone = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*own, *alone, last])
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return tokenizer


def sentencepiece(
    *, metaspace: bool = False, begins: bool = True, prefix: bool = True
) -> Tokenizer:
    """Byte-pair encoding with byte fallback over ASCII: Llama 2, Mistral, TinyLlama.

    Spaces become marks in the normaliser, or (`metaspace`) in the pre-tokenizer, which is what
    later files say; `begins` puts <s> before a text, `prefix` a space.
    """
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "["), ("I", "N"), ("S", "T")]
    merges += [("IN", "ST"), ("▁", "▁"), ("▁", "1")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*map(chr, range(33, 127)), *(a + b for a, b in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    marks = decoders.Replace("▁", " ")
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([marks, decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]]
    )
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A <s> $B", [("<s>", 1)]
        )
    return tokenizer


def write_sentencepiece_model(folder: Path) -> None:
    """tokenizer.model of the folder's tokenizer.json: a protobuf message of pieces and scores."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    rank = {"".join(pair): index for index, pair in enumerate(raw["model"]["merges"])}

    def number(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    def block(field: int, data: bytes) -> bytes:
        return number(field << 3 | 2) + number(len(data)) + data

    def integer(field: int, value: int) -> bytes:
        return number(field << 3) + number(value)

    pieces = b""
    for piece, index in sorted(raw["model"]["vocab"].items(), key=lambda item: item[1]):
        kind = {0: _UNKNOWN, 1: _CONTROL, 2: _CONTROL}.get(index, _NORMAL)
        kind = _BYTE if piece.startswith("<0x") else kind
        score = struct.pack("<f", -float(rank.get(piece, len(rank))))
        pieces += block(1, block(1, piece.encode()) + number(2 << 3 | 5) + score + integer(3, kind))
    byte_pairs, byte_fallback, as_it_is = 2, integer(35, 1), block(1, b"identity")
    trainer = integer(3, byte_pairs) + integer(4, len(raw["model"]["vocab"])) + byte_fallback
    normalizer = as_it_is + integer(3, 1) + integer(4, 0)
    (folder / "tokenizer.model").write_bytes(pieces + block(2, trainer) + block(3, normalizer))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the size of the vocabulary."""
    tokenizer.save(str(folder / "tokenizer.json"))
    pieces = tokenizer.token_to_id("</s>") is not None
    named = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
        **(named if pieces else {"eos_token": _end_of_turn(tokenizer)}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _end_of_turn(tokenizer: Tokenizer) -> str:
    known = ("<|im_end|>", "<|eot_id|>")
    return next(token for token in known if tokenizer.token_to_id(token) is not None)


def gguf_tokenizer(folder: Path, pre: str | None, vocab_size: int) -> dict[str, Any]:
    """What llama.cpp's converter takes from the tokenizer files of a folder.

    A merged piece of SentencePiece has its rank as its score, as in tokenizer.model; a
    vocabulary smaller than the embedding is filled up.
    """
    raw = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    tokens += [t["content"] for t in raw["added_tokens"] if t["id"] >= len(tokens)]
    added = {
        token["content"]: _CONTROL if token["special"] else _USER_DEFINED
        for token in raw["added_tokens"]
    }
    added["<unk>"] = _UNKNOWN
    pieces = raw["model"].get("byte_fallback", False)
    types = [
        added.get(token, _BYTE if pieces and token.startswith("<0x") else _NORMAL)
        for token in tokens
    ]
    merges = [pair if isinstance(pair, list) else pair.split() for pair in raw["model"]["merges"]]
    rank = {a + b: index for index, (a, b) in enumerate(merges)}
    fillers = [f"[PAD{index}]" for index in range(len(tokens), vocab_size)]
    tokens, types = [*tokens, *fillers], [*types, *[_UNUSED] * len(fillers)]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    made: dict[str, Any] = {
        "model": "llama" if pieces else "gpt2",
        "pre": pre,
        "tokens": tokens,
        "types": types,
        "eos": tokens.index(config["eos_token"]),
        "bos": tokens.index(config.get("bos_token", raw["added_tokens"][0]["content"])),
    }
    if pieces:
        made["scores"] = [-float(rank.get(token, len(rank))) for token in tokens]
    else:
        made["merges"] = [f"{a} {b}" for a, b in merges]
    return made
