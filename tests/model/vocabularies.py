"""Small tokenizers, made as the families' own tokenizer.json files are: the oracle of the tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

# How text is cut before the merges, from the published tokenizer.json files.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "  2024 is the  year,\n\n it's  x1+1 = 12345; DON'T foo.bar(x) McDonald\r\n\t",
    "Zwölf Boxkämpfer 你好，世界 مرحبا 🙂👩‍👩‍👧 e\u0301 ﬁ ½",
    "<|im_start|>user\nhi <|im_end|>\n<think>\n<｜User｜>Hi<｜Assistant｜>",
    " leading",
    "trailing ",
    "",
)


@functools.cache
def corpus() -> tuple[str, ...]:
    """Real text and code, enough for a few hundred merges: the project's own."""
    root = Path(__file__).parents[2]
    files = [*sorted((root / "docs").glob("*.md")), Path(__file__)]
    return tuple(file.read_text(encoding="utf-8") for file in files)


def byte_level(
    split: str | None,
    *,
    digits: bool = False,
    ignore_merges: bool = False,
    composed: bool = False,
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    plain: tuple[str, ...] = ("<think>",),
) -> Any:
    """A `tokenizers.Tokenizer`; `split` is the regex of its cut, None GPT-2's own.

    `special` and `plain` are the added tokens, after the vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as cuts
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    steps = [cuts.Digits(individual_digits=True)] if digits else []
    if split is not None:
        steps.append(cuts.Split(Regex(split), "isolated"))
    steps.append(cuts.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = cuts.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(cuts.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    return tokenizer


def sentencepiece(*, spaced: bool = True) -> Any:
    """Llama 2's kind: merges over characters, spaces as ▁, bytes where there is no piece."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    words = ["▁", *map(chr, range(33, 127)), "é", "▁▁"]
    words += ["th", "he", "in", "▁t", "▁th", "▁the", "the", "▁i", "▁in", "er", "▁1", "hé"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in words
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [AddedToken(t, special=True, normalized=False) for t in pieces[:3]]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s> $B", [("<s>", 1)]
    )
    return tokenizer


def gguf_metadata(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a tokenizer; `more` are named without their prefix."""
    import json

    state = json.loads(tokenizer.to_str())
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [6 if len(t) == 6 and t.startswith("<0x") else 1 for t in tokens]
    for token in state["added_tokens"]:
        types[token["id"]] = 3 if token["special"] else 4
    fields: dict[str, Any] = {"tokens": tokens, "token_type": types}
    if state["model"]["byte_fallback"]:
        types[0] = 2
        scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
        fields |= {"model": "llama", "scores": scores, "bos_token_id": 1, "eos_token_id": 2}
        fields |= {"unknown_token_id": 0}
    else:
        merges = [" ".join(pair) for pair in state["model"]["merges"]]
        fields |= {"model": "gpt2", "merges": merges}
    return {f"tokenizer.ggml.{name}": value for name, value in {**fields, **more}.items()}
