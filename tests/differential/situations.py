"""What a row of the table is: a tiny model, what is unusual about it, and what must be the same."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from differential.vocabularies import byte_level, gguf_tokenizer, write_tokenizer
from model.families import hf_model
from model.sources import ARCHITECTURES
from model.sources import write_gguf as write_gguf_file

# One of each family whose decoder or reading differs; FAMILIES in tests/model has the variants.
_NEWER = ("phi3-partial", "granite", "smollm3", "ministral3")
EVERY = ("llama", "llama3-rope", "mistral", "qwen2", "qwen3", *_NEWER)
# A SmolLM3 has rope of its own there.
IN_GGUF = tuple(name for name in EVERY if name not in ("llama3-rope", "smollm3"))
LLAMA = ("llama",)


@dataclass(slots=True)
class Made:
    """A tiny model on disk."""

    model: Any  # transformers' own, in float32
    folder: Path  # in Hugging Face's form: what the oracle reads
    given: Path  # what teal is told to read: the folder, or a file made from it
    tensors: dict[str, torch.Tensor] | None = (
        None  # what a packer put in, if transformers can't read
    )


Step = Callable[[Made], Any]
Comparison = Callable[[Made, Any], None]
# Scores of the next token, by the token before it; the model looks at nothing else.
Chain = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Situation:
    """A row: `steps` change a tiny model of each of `families`, and `same` compares the outcome.

    `model` are fields of its config; with a `chain` it says what the chain tells it to, and rows
    that a larger `vocab_size` adds are never said.
    """

    name: str
    same: Comparison
    steps: tuple[Step, ...] = ()
    families: tuple[str, ...] = LLAMA
    vocabulary: Callable[[], Any] = byte_level
    model: Mapping[str, Any] = field(default_factory=dict)
    chain: Chain | None = None
    transformers: str | None = None  # the oldest release that can follow

    def make(self, root: Path, family: str) -> Made:
        """Write the model into an empty folder."""
        folder = root / "model"
        folder.mkdir()
        tokenizer = self.vocabulary()
        size = write_tokenizer(folder, tokenizer)
        if self.chain is None:
            own = {"vocab_size": size, "num_hidden_layers": 2, **self.model}
            model = hf_model(family, **own)
        else:
            model = chain_model(family, tokenizer, self.chain, **self.model)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        made = Made(model, folder, folder)
        for step in self.steps:
            step(made)
        return made


def chain_model(family: str, tokenizer: Any, chain: Chain, **more: Any) -> Any:
    """A model whose hidden state is the last token, one-hot, and whose head is the chain."""
    size = tokenizer.get_vocab_size()
    own = {
        "vocab_size": size,
        "hidden_size": -(-size // 64) * 64,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
    }
    model = hf_model(family, **{**own, **more})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:size, :size] = torch.eye(size)
        for token, following in chain.items():
            for after, score in following.items():
                column = tokenizer.token_to_id(token)
                model.lm_head.weight[tokenizer.token_to_id(after), column] = score
    return model


def path(*tokens: str) -> Chain:
    """A chain that says one token after the other."""
    return {a: {b: 2.0} for a, b in itertools.pairwise(tokens)}


def on_folder(*edits: Callable[[Path], Any]) -> Step:
    """Edits of the folder, for teal and the oracle alike."""

    def step(made: Made) -> None:
        for edit in edits:
            edit(made.folder)

    return step


def only_for_teal(*edits: Callable[[Path], Any]) -> Step:
    """Edits of a copy that teal reads; the oracle reads the folder as it was."""

    def step(made: Made) -> None:
        made.given = Path(shutil.copytree(made.folder, made.folder.parent / "given"))
        for edit in edits:
            edit(made.given)

    return step


def as_gguf(
    metadata: Mapping[str, Any] | None = None,
    *,
    pre: str | None = "default",
    name: str = "model.gguf",
    template: bool = True,
    given: Callable[[Path], Path] = lambda path: path,
    **options: Any,
) -> Step:
    """Give teal a GGUF file of the model; `{arch}` in a key stands for the architecture.

    Args:
        metadata: keys that the converter would not write, or writes otherwise.
        pre: the pre-tokenizer's name in the file; None leaves it out.
        name: the file's name.
        template: whether the file holds the folder's chat template.
        given: which path teal is told, from the written one.
        options: those of `write_gguf`.
    """

    def step(made: Made) -> None:
        raw = json.loads((made.folder / "tokenizer.json").read_text())
        config = json.loads((made.folder / "tokenizer_config.json").read_text())
        kind = made.model.config.model_type
        architecture = ARCHITECTURES.get(kind, kind)
        keys = {"tokenizer.ggml.add_bos_token": raw["post_processor"] is not None}
        if template and "chat_template" in config:
            keys["tokenizer.chat_template"] = config["chat_template"]
        for key, value in (metadata or {}).items():
            keys[key.replace("{arch}", architecture)] = value
        own = {key: value(made) if callable(value) else value for key, value in options.items()}
        written = write_gguf_file(
            made.folder.parent / name,
            made.model,
            tokenizer=gguf_tokenizer(made.folder, pre, made.model.config.vocab_size),
            metadata=keys,
            **own,
        )
        made.given = given(written)

    return step
