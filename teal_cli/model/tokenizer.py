"""A model's tokenizer: the one that its makers stored, never one that a class rebuilds from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teal_cli.errors import MissingError, TealError, whole
from teal_cli.model.config import read_object

_FORMS = ("tokenizer.json", "tekken.json", "tokenizer.model", "vocab.json")  # the first one counts
# Words, runs of spaces, digits and other scripts: what two tokenizers differ in first.
_PROBE = "The quick  brown fox, 12345 über it's\n the 你好 (x)."


def load_tokenizer(folder: Path, name: str) -> Any:
    """The transformers tokenizer around the tokenizer.json in a folder of the model `name`.

    The plain class takes that file as it is, with the special tokens, flags and templates of the
    files beside it. LlamaTokenizer, Qwen2Tokenizer and others, which tokenizer_config.json may
    name, put pipelines of their own around its vocabulary; and AutoTokenizer, which chooses among
    them, takes 2 s to import on a Zen 3.

    Raises:
        MissingError: there is none.
        TealError: it is not usable.
    """
    if not (folder / "tokenizer.json").is_file():
        raise MissingError(
            f"{name} has no tokenizer.json in {folder}",
            hint=f"Make it again: `teal convert {name} --force`.",
        )
    try:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        legacy = folder / "chat_template.json"  # which transformers reads for processors only
        if not tokenizer.chat_template and legacy.is_file():
            tokenizer.chat_template = read_object(legacy).get("chat_template")
        tokenizer("a")  # some faults show in use only
    except Exception as error:  # the libraries raise what they like, bare exceptions too
        raise TealError(f"{name} has no usable tokenizer: {whole(error)}") from None
    return tokenizer


def complete_tokenizer(folder: Path, name: str) -> None:
    """See to it that a folder of the model `name` holds a tokenizer.json, and that it works.

    Another form is converted by transformers, once. The folder holds the model's config.json too,
    by which transformers knows what vocab.json and merges.txt mean.

    Raises:
        MissingError: there is no tokenizer, or a package that reads it is not installed.
        TealError: it is not usable.
    """
    form = next((form for form in _FORMS if (folder / form).is_file()), None)
    if form is None:
        raise MissingError(
            f"{name} has no tokenizer: none of {', '.join(_FORMS)} is beside its weights",
            hint="Put the tokenizer files of the model that it was made from into its folder.",
        )
    if form != "tokenizer.json":
        try:
            tokenizer = (
                _vocabulary(folder, name)
                if form == "vocab.json"
                else _single_file(folder / form, name)
            )
            tokenizer.save_pretrained(folder)
        except TealError:
            raise
        except Exception as error:  # the libraries raise what they like
            raise TealError(
                f"{name} has no tokenizer.json, and its {form} cannot be converted: {whole(error)}",
                hint="Put the tokenizer.json of the model that it was made from into its folder.",
            ) from None
    load_tokenizer(folder, name)


def _single_file(path: Path, name: str) -> Any:
    """Mistral's tekken.json, or a tokenizer.model of sentencepiece or tiktoken."""
    from transformers import PreTrainedTokenizerFast

    stated = path.with_name("tokenizer_config.json")
    config = read_object(stated) if stated.is_file() else {}
    usual: dict[str, Any] = {}
    if path.name == "tekken.json":
        usual = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    # A protobuf; tiktoken's lines begin with base64.
    sentencepiece = path.suffix == ".model" and path.read_bytes()[:1] == b"\n"
    if sentencepiece:
        _check_sentencepiece(path, name)
        usual = {"add_bos_token": True}  # as llama.cpp takes it, and LlamaTokenizer took it
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        path.parent,
        local_files_only=True,
        trust_remote_code=False,
        **{key: value for key, value in usual.items() if key not in config},
    )
    if sentencepiece:
        _check_pieces(tokenizer, path, name)
    return tokenizer


def _check_sentencepiece(path: Path, name: str) -> None:
    """transformers would take a file that it cannot read for tiktoken's, and ask for that."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise MissingError(
            f"{name} has no tokenizer.json, and reading its tokenizer.model takes the packages "
            "sentencepiece and protobuf",
            hint="Run `pip install sentencepiece protobuf`, or put a tokenizer.json beside it.",
        )
    SentencePieceExtractor(str(path))


def _check_pieces(tokenizer: Any, path: Path, name: str) -> None:
    """transformers before 5.24 makes other tokens of such files, without a word."""
    from sentencepiece import SentencePieceProcessor
    from transformers import __version__

    expected = SentencePieceProcessor(model_file=str(path)).encode(_PROBE)
    if tokenizer.encode(_PROBE, add_special_tokens=False) != expected:
        raise TealError(
            f"{name} has no tokenizer.json, and transformers {__version__} makes another tokenizer "
            f"of its {path.name} than sentencepiece does",
            hint="Run `pip install -U transformers` (5.24 reads more of them), or put a "
            "tokenizer.json beside it.",
        )


def _vocabulary(folder: Path, name: str) -> Any:
    """Byte-level vocab.json and merges.txt, by the class that the model's config names."""
    from transformers import AutoTokenizer

    if not (folder / "merges.txt").is_file():
        raise MissingError(f"{name} has vocab.json, but no merges.txt and no tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    lost = read_object(folder / "vocab.json").keys() - tokenizer.get_vocab().keys()
    if lost:  # a class that reads other files makes a tokenizer of three tokens, without a word
        raise TealError(f"{type(tokenizer).__name__} does not read vocab.json")
    return tokenizer
