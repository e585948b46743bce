"""Builds a Hugging Face tokenizer from a GGUF file's metadata, through transformers' converter.

GGUF names the way a text is cut before the merges by a word. transformers knows the regex of two
dozen of these words; what else llama.cpp does by the word (src/llama-vocab.cpp) is written here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teal_cli.errors import TealError, UnsupportedError, whole
from teal_cli.model.tokenizer import panics_explained
from teal_cli.progress import Reporter

_CONTROL, _USER_DEFINED = 3, 4  # token types
_BYTES = 256  # a vocabulary of these and some special tokens needs no merges
_LONGEST = 4096  # characters; runs of spaces and dashes are the longest, with a few hundred
_MOST_CUT = 1 << 30  # characters, in all cuts of all tokens: a second; Gemma 3 has 2 % of it

# A word that is a token is taken before any merge, and a text begins with BOS.
_LLAMA_3 = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken"),
)
# GPT-2's own cut, which transformers' converter takes for any word that it does not know.
_GPT_2 = (
    *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0"),
    *("mellum", "granite-docling"),
)
# The same after every digit was set apart.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Only for a transformers before 5.18: digits by threes, by which alone Qwen 2 differs.
_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_COMPOSED = ("qwen2", "qwen35")  # their tokenizer.json composes characters (NFC) first

# Files of before May 2024 name none, or "default"; these tokens stand nowhere else.
_RECOGNISED = {
    "llama-bpe": {128000: "<|begin_of_text|>", 128006: "<|start_header_id|>"},
    "qwen2": {151643: "<|endoftext|>", 151644: "<|im_start|>"},
}
_ROLES = ("bos", "eos", "unknown", "padding", "eot", "eom")
# What llama.cpp takes for a sentencepiece vocabulary that does not name them.
_USUAL_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def write_tokenizer(
    folder: Path, metadata: dict[str, Any], model_max_length: int, reporter: Reporter
) -> None:
    """Write tokenizer.json and tokenizer_config.json, chat templates included.

    Raises:
        TealError: the metadata hold no tokenizer, or a wrong one.
        UnsupportedError: its kind or its pre-tokenizer is not known.
    """
    try:
        with panics_explained():
            _write(folder, metadata, model_max_length, reporter)
    except TealError:
        raise
    except Exception as error:  # the libraries raise bare exceptions
        raise TealError(f"the GGUF file's tokenizer is damaged: {whole(error)}") from None


def _write(
    folder: Path, metadata: dict[str, Any], model_max_length: int, reporter: Reporter
) -> None:
    tokens, kind = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not tokens:
        raise TealError("the GGUF file holds no tokenizer")
    for name in ("tokens", "merges"):
        texts = metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TealError(f"the GGUF file's tokenizer is damaged: its {name} are no texts")
    lengths = [len(token) for token in tokens]
    # Every way to cut each of them is tried.
    if max(lengths) > _LONGEST or sum(length**2 for length in lengths) > _MOST_CUT:
        raise TealError(
            f"the GGUF file's tokenizer is damaged: tokens of up to {max(lengths):,} characters"
        )
    _check_fields(metadata, kind)
    merges = metadata.get("tokenizer.ggml.merges", ())
    if kind == "gpt2" and not merges and sum(length > 1 for length in lengths) > _BYTES:
        raise TealError("the GGUF file's tokenizer is damaged: it holds words and no merges")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"GGUF tokenizer {kind!r} is not supported")
    pre = _pre_tokenizer(metadata, reporter) if kind == "gpt2" else None
    ids = {} if pre else dict(_USUAL_IDS)
    for name in _ROLES:
        ids[name] = metadata.get(f"tokenizer.ggml.{name}_token_id", ids.get(name, -1))
    ids = {name: i for name, i in ids.items() if 0 <= i < len(tokens)}
    tokenizer = _tokenizer(metadata, pre, ids)
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **{f"{ours}_token": tokens[ids[name]] for name, ours in names.items() if name in ids},
    }
    if templates := _chat_templates(metadata):
        config["chat_template"] = templates
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _check_fields(metadata: dict[str, Any], kind: Any) -> None:
    """Name the key that holds something else than it should.

    Raises:
        TealError: there is one.
    """
    count, prefix = len(metadata["tokenizer.ggml.tokens"]), "tokenizer.ggml."
    for name in ("scores", "token_type"):
        default = () if (name, kind) == ("scores", "llama") else range(count)
        found = len(metadata.get(prefix + name, default))
        if found != count:
            raise TealError(
                f"the GGUF file's tokenizer is damaged: {name} of {found} of {count} tokens"
            )
    for name in _ROLES:
        number = metadata.get(f"{prefix}{name}_token_id", 0)
        if not isinstance(number, int):
            raise TealError(
                f"the GGUF file's tokenizer is damaged: {name}_token_id is {number!r}, no number"
            )


def _pre_tokenizer(metadata: dict[str, Any], reporter: Reporter) -> str:
    """The word for how a text is cut, as the file or its vocabulary gives it."""
    pre = metadata.get("tokenizer.ggml.pre") or "default"
    if pre == "default":
        tokens = metadata["tokenizer.ggml.tokens"]
        for name, marks in _RECOGNISED.items():
            if all(tokens[i : i + 1] == [token] for i, token in marks.items()):
                return name
        reporter.note(
            "this GGUF file does not say how its tokenizer cuts text (tokenizer.ggml.pre), and its "
            "vocabulary is not one that teal knows: it is cut as GPT-2 does, which may not be what "
            "the model was trained on; a newer GGUF file or the model's safetensors would say"
        )
        return "gpt-2"
    known = {*_GPT_2, *_DIGITS, *_splits()}
    if pre not in known:
        raise UnsupportedError(
            f"GGUF pre-tokenizer {pre!r} is not supported",
            hint=f"Supported: {', '.join(sorted(known))}. Use the model's safetensors instead.",
        )
    return str(pre)


def _splits() -> dict[str, str]:
    """The regex of each pre-tokenizer that transformers knows; before 5.18 it knew none."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

        return dict(mapping.GGUF_PRE_TOKENIZER_SPLITS)
    except (ImportError, AttributeError):
        return {"llama-bpe": _LLAMA_3_SPLIT, "qwen2": _LLAMA_3_SPLIT.replace("{1,3}", "")}


def _converter() -> Any:
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # before 5.18
        from transformers.integrations.ggml import convert_gguf_tokenizer
    return convert_gguf_tokenizer


def _tokenizer(metadata: dict[str, Any], pre: str | None, ids: dict[str, int]) -> Any:
    """The tokenizers object; `pre` is None for a sentencepiece vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    fields: dict[str, Any] = {"tokens": tokens, "tokenizer_type": "gpt2" if pre else "llama"}
    if pre:
        fields["merges"] = metadata.get("tokenizer.ggml.merges", ())
    else:
        fields["scores"] = metadata["tokenizer.ggml.scores"]
        # Its special tokens are dropped again below; before 5.18 it wants all of them named.
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        for theirs, role in roles.items():
            fields[f"{theirs}_token_id"] = ids.get(role, ids["unknown"])
    # Phi 3's sentencepiece is as llama.cpp's: a space before each text between control tokens.
    converted, _ = _converter()("gpt2" if pre else "phi3", fields)

    # The converter's classes add tokens of their own, and spell others in another way.
    state = json.loads(converted.to_str())
    state["added_tokens"], state["post_processor"] = [], None
    model = state["model"]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    model["ignore_merges"] = pre in _LLAMA_3
    if pre is None:
        model |= {"unk_token": tokens[ids["unknown"]], "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if pre is None:  # older versions of the converter leave the spaces as they are
        spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
        steps = [normalizers.Prepend("▁")] if spaced else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * bool(spaced))
    if split := _splits().get(pre or ""):
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spelled])
    if pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    _add_tokens(tokenizer, metadata, ids)
    _add_ends(tokenizer, metadata, pre, ids)
    return tokenizer


def _add_tokens(tokenizer: Any, metadata: dict[str, Any], ids: dict[str, int]) -> None:
    """Tokens that are found in the text as they stand; those with a role are special."""
    from tokenizers import AddedToken

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = dict(enumerate(metadata.get("tokenizer.ggml.token_type", ())))
    kinds |= dict.fromkeys(ids.values(), _CONTROL)

    def of(wanted: int) -> list[Any]:
        texts = (token for i, token in enumerate(tokens) if token and kinds.get(i) == wanted)
        return [AddedToken(text, special=wanted == _CONTROL, normalized=False) for text in texts]

    # All at once: the library sorts what it has at every call.
    tokenizer.add_special_tokens(of(_CONTROL))
    tokenizer.add_tokens(of(_USER_DEFINED))


def _add_ends(
    tokenizer: Any, metadata: dict[str, Any], pre: str | None, ids: dict[str, int]
) -> None:
    """Begin and end every text where the file says so, or says nothing and llama.cpp would."""
    from tokenizers.processors import TemplateProcessing

    usual = {"bos": pre is None or pre in _LLAMA_3, "eos": False}
    wanted = {
        end: metadata["tokenizer.ggml.tokens"][ids[end]]
        for end in usual
        if end in ids and metadata.get(f"tokenizer.ggml.add_{end}_token", usual[end])
    }
    if wanted:
        bos, eos = ([wanted[end]] if end in wanted else [] for end in usual)
        tokenizer.post_processor = TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, ids[end]) for end, token in wanted.items()],
        )


def _chat_templates(metadata: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or all of them with their names where there are several."""
    key = "tokenizer.chat_template"
    default: str | None = metadata.get(key)
    named = {k.removeprefix(f"{key}."): v for k, v in metadata.items() if k.startswith(f"{key}.")}
    if not named:
        return default
    if default:
        named = {"default": default, **named}
    return [{"name": name, "template": template} for name, template in named.items()]
