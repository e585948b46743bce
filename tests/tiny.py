"""A tiny random model in Hugging Face's format: real files, no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teal_cli.model.config import ModelConfig

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Its vocabulary is that of the tokenizer below.
SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def config(**changes: Any) -> ModelConfig:
    """A Llama of that shape, but for `changes`."""
    return ModelConfig.from_dict({"model_type": "llama", "rms_norm_eps": 1e-5, **SHAPE, **changes})


def write_tokenizer(folder: Path, *, chat: bool = True) -> int:
    """Write a byte-level tokenizer (one token a byte, three special ones); return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": special[1:2]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocab)


def write_model(
    folder: Path, *, model_type: str = "llama", chat: bool = True, seed: int = 0, **overrides: Any
) -> Path:
    """Save a random model of a few thousand weights with its tokenizer, as transformers would."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, chat=chat)
    settings: dict[str, Any] = {
        **SHAPE,
        "vocab_size": vocab_size,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **overrides,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == settings["hidden_size"]
    return folder
