"""Builds a Hugging Face tokenizer from a GGUF file's metadata.

GGUF names a pre-tokenizer by a word; what the word means is written in the models' own
tokenizer.json files. transformers' loader ignores it for most words: SmolLM2's digits, which
must stand alone, then merge with the spaces before them in another way than in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teal_cli.errors import TealError, UnsupportedError

_CONTROL, _USER_DEFINED = 3, 4  # token types

# How text is cut before the merges: Llama 3 takes digits by threes, Qwen one at a time.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _SPLIT.replace("DIGITS", r"\p{N}{1,3}"),
    "qwen2": _SPLIT.replace("DIGITS", r"\p{N}"),
}
_PRE_TOKENIZERS = ("default", "gpt-2", "smollm", *_SPLITS)


def write_tokenizer(folder: Path, metadata: dict[str, Any], model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat template included.

    Raises:
        TealError: the metadata hold no tokenizer, or a wrong one.
        UnsupportedError: its kind or its pre-tokenizer is not known.
    """
    try:
        _write(folder, metadata, model_max_length)
    except TealError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise TealError(f"the GGUF file's tokenizer is damaged: {detail}") from None


def _write(folder: Path, metadata: dict[str, Any], model_max_length: int) -> None:
    if not metadata.get("tokenizer.ggml.tokens"):
        raise TealError("the GGUF file holds no tokenizer")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UnsupportedError(f"GGUF tokenizer {kind!r} is not supported")
    _add_control_tokens(tokenizer, metadata)
    _add_bos(tokenizer, metadata)
    tokenizer.save(str(folder / "tokenizer.json"))

    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config: dict[str, Any] = {
        # Known to every version of transformers; a family's own class may rebuild what it reads.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    for theirs, ours in names.items():
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None and token < len(tokens):
            config[f"{ours}_token"] = tokens[token]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _byte_level(metadata: dict[str, Any]) -> Any:
    """Byte-pair encoding over bytes: GPT-2, Llama 3, Qwen, SmolLM2."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"GGUF pre-tokenizer {pre!r} is not supported",
            hint=f"Supported: {', '.join(_PRE_TOKENIZERS)}. Use the model's safetensors instead.",
        )
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre in _SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any]) -> Any:
    """SentencePiece's byte-pair encoding with byte fallback: Llama 2, Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = metadata["tokenizer.ggml.tokens"]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges(tokens, metadata["tokenizer.ggml.scores"]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, best score first."""
    rank = {token: (-score, i) for i, (token, score) in enumerate(zip(tokens, scores, strict=True))}
    found = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        pairs.sort(key=lambda pair: (rank[pair[0]][1], rank[pair[1]][1]))
        found += [(rank[token][0], pair) for pair in pairs]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _add_control_tokens(tokenizer: Any, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type", ())
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _add_bos(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Begin every text with BOS where the file says so, or says nothing and llama.cpp would."""
    from tokenizers.processors import TemplateProcessing

    usual = (
        metadata["tokenizer.ggml.model"] == "llama"
        or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    )
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is None or not metadata.get("tokenizer.ggml.add_bos_token", usual):
        return
    token = metadata["tokenizer.ggml.tokens"][bos]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
    )
