"""The demo model, converted from its GGUF file, against transformers on the same weights."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.model.hf_layout import parts
from teal_cli.model.random_weights import SHAPES
from teal_cli.model.sites import FUSED

pytestmark = pytest.mark.demo

TEXT = """Water is an inorganic compound with the chemical formula H2O. It is a transparent,
tasteless, odorless, and nearly colorless chemical substance. It is the main constituent of Earth's
hydrosphere and the fluids of all known living organisms, in which it acts as a solvent. In 2024,
about 71 % of the Earth's surface was covered by it, mostly in seas and oceans. Small portions of
water occur as groundwater (1.7 %), in the glaciers and the ice caps of Antarctica and Greenland
(1.7 %), and in the air as vapor, clouds and precipitation (0.001 %)."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "In 1969, the first people to walk on the Moon were",
)


@pytest.fixture(scope="module")
def decoder(demo_checkpoint: Checkpoint) -> Decoder:
    return demo_checkpoint.load()


@pytest.fixture(scope="module")
def tokenizer(demo_checkpoint: Checkpoint) -> Any:
    return demo_checkpoint.tokenizer()


@pytest.fixture(scope="module")
def theirs(decoder: Decoder) -> Any:
    """transformers' Llama over our weights, turned back into its layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = decoder.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    state: dict[str, Tensor] = {}
    for name, tensor in decoder.weights.named_tensors():
        kind = name.rpartition(".")[2]
        if kind in FUSED:
            bounds = decoder.offsets[kind]
            blocks = pairwise(bounds)
            pieces = [tensor[:, start:stop].T for start, stop in blocks]
        else:
            pieces = [tensor]
        named = zip(parts(name, fused=False), pieces, strict=True)
        state |= {part: piece.float() for part, piece in named}
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables are not weights
    return model.eval()


def greedy(decoder: Decoder, prompt: Tensor, count: int) -> list[int]:
    cache = decoder.new_cache(len(prompt) + count)
    position, piece, out = 0, prompt, []
    with torch.no_grad():
        for _ in range(count):
            hidden = decoder.forward(piece, cache=cache, position=position)
            position += len(piece)
            out.append(int(decoder.logits(hidden[-1:]).argmax()))
            piece = torch.tensor(out[-1:])
    return out


def test_shape_and_size(decoder: Decoder, demo_checkpoint: Checkpoint) -> None:
    parameters = sum(tensor.numel() for _, tensor in decoder.weights.named_tensors())
    assert parameters == 134_515_008
    assert decoder.config == SHAPES["smollm2-135m"]
    assert decoder.config == dataclasses.replace(decoder.config, rms_norm_eps=1e-5)
    assert decoder.dtype == torch.float16
    assert demo_checkpoint.eos_token_ids == (2,)


def test_tokenizer_is_smollm2s(tokenizer: Any) -> None:
    ids = tokenizer("  2024: it's")["input_ids"]  # no BOS; digits alone
    assert tokenizer.convert_ids_to_tokens(ids) == ["ĠĠ", "2", "0", "2", "4", ":", "Ġit", "'s"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(chat)["input_ids"][:2] == [1, 9690]


def test_tokenizer_loads_without_a_word(demo_checkpoint: Checkpoint) -> None:
    program = (
        "import sys; from transformers import AutoTokenizer; "
        "print(len(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program, str(demo_checkpoint.folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.stdout == "49152\n"
    assert run.stderr == ""


def test_greedy_answer_is_paris(decoder: Decoder, tokenizer: Any) -> None:
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"][0]
    assert tokenizer.decode(greedy(decoder, prompt, 2)) == " Paris."


def test_greedy_tokens_equal_transformers(decoder: Decoder, theirs: Any, tokenizer: Any) -> None:
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )[0, ids.shape[1] :]
        assert greedy(decoder, ids[0], len(expected)) == expected.tolist()


def test_perplexity_equals_transformers(decoder: Decoder, theirs: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        ours = decoder.logits(decoder.forward(ids))
        expected = theirs(ids[None]).logits[0]
    losses = [torch.nn.functional.cross_entropy(x[:-1], ids[1:]) for x in (ours, expected)]
    ratio = (losses[0] - losses[1]).exp()
    assert 1 < losses[0].exp() < 15
    assert abs(ratio - 1) < 1e-4
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-4)


def test_dequantized_weights_equal_the_gguf_packages(demo_gguf: Path, decoder: Decoder) -> None:
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(demo_gguf).tensors}

    def stored(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(torch.float16)

    layer = decoder.weights.layers[17]
    assert layer.down.T.equal(stored("blk.17.ffn_down.weight"))
    assert layer.gate_up[:, 1536:].T.equal(stored("blk.17.ffn_up.weight"))
    assert layer.qkv[:, 768:].T.equal(stored("blk.17.attn_v.weight"))
    query = stored("blk.17.attn_q.weight").view(9, 32, 2, 576)  # interleaved rotary pairs
    assert layer.qkv[:, :576].T.equal(query.transpose(1, 2).reshape(576, 576))
    assert decoder.weights.embed_tokens.equal(stored("token_embd.weight"))
