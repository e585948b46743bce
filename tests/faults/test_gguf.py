"""Damaged GGUF files: metadata of the wrong kind, headers with bytes changed, files cut short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.damage import outcome, spoilt
from hypothesis import given
from hypothesis import strategies as st
from model.sources import source_of, write_gguf

from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.progress import Silent

QUIET = Silent()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEAL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", name="model")
def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def whole(request: pytest.FixtureRequest, model: Any, tmp_path_factory: Any) -> bytes:
    """A good file's bytes."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    return write_gguf(path, model, quantization=request.param).read_bytes()


def use(path: Path) -> None:
    checkpoint = Checkpoint(convert(source_of(path), reporter=QUIET, force=True))
    session = Session(checkpoint.load(), max_length=4, backend="reference")
    session.prefill([1, 2])
    checkpoint.tokenizer().encode("Hi")


@given(data=st.data())
def test_bytes(data: st.DataObject, whole: bytes, tmp_path: Path, home: None) -> None:
    path = tmp_path / "model.gguf"
    header = whole.index(b"blk.0.ffn_up") + 80
    within = data.draw(st.sampled_from([40, 700, header]))
    path.write_bytes(data.draw(spoilt(whole, within=within)))
    outcome(lambda: use(path))


KEYS = [
    "general.architecture",
    "general.alignment",
    "split.count",
    "split.no",
    "split.tensors.count",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.key_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.yarn_ext_factor",
    "llama.rope.scaling.yarn_beta_fast",
    "llama.rope.scale_linear",
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.expert_count",
    "general.type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
]
WORDS = ["llama", "qwen2", "gpt2", "llama-bpe", "smollm", "linear", "yarn", "", "a b", "<s>"]


@given(data=st.data())
def test_metadata(
    data: st.DataObject, model: Any, tmp_path: Path, home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = st.one_of(
        st.sampled_from(WORDS),
        st.sampled_from([0, 1, -1, 2, 3, 299, 300, 2**31 - 1]),
        st.booleans(),
        st.floats(width=32),
    )
    same_kind = st.one_of(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
        st.lists(st.integers(-1, 4), min_size=1, max_size=3),
        st.lists(st.floats(width=32), min_size=1, max_size=3),
    )
    changes = data.draw(
        st.dictionaries(st.sampled_from(KEYS), scalar | same_kind, min_size=1, max_size=3)
    )
    path = tmp_path / "model.gguf"

    import gguf

    add = gguf.GGUFWriter.add_key_value

    def changed(self: Any, key: str, value: Any, kind: Any, *rest: Any) -> None:
        if key not in changes:
            add(self, key, value, kind, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_key_value", changed)
        patch.setattr("gguf.GGUFWriter.write_header_to_file", with_changes(changes, add))
        write_gguf(path, model)
    outcome(lambda: use(path))


def with_changes(changes: dict[str, Any], add: Any) -> Any:
    """`write_header_to_file`, after the changed metadata were added."""
    import gguf

    write = gguf.GGUFWriter.write_header_to_file

    def write_changed(self: Any, *rest: Any) -> None:
        for key, value in changes.items():
            add(self, key, value, gguf.GGUFValueType.get_type(value))
        write(self, *rest)

    return write_changed
