"""Damaged models: config.json, safetensors, indexes, tokenizers, generation defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from faults.damage import changed, json_files, outcome, scalars, spoilt, values
from hypothesis import given
from hypothesis import strategies as st
from model.sources import source_of

from teal_cli.inference.chat_template import ChatTemplate
from teal_cli.inference.conversation import Conversation
from teal_cli.inference.defaults import chat_defaults, sampling_defaults
from teal_cli.inference.ends import stop_token_ids
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint, load_tokenizer
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import convert
from teal_cli.progress import Silent

QUIET = Silent()
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is as small as a model can be."""
    return tiny.write_model(
        tmp_path_factory.mktemp("faults") / "model",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One home for all examples of a test; each makes its model anew."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("TEAL_HOME", str(home))
        yield home


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to spoil; each example writes the same file."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def use(path: Path) -> None:
    """Convert a model and run it, as far as it lets itself."""
    checkpoint = Checkpoint(convert(source_of(path), reporter=QUIET, force=True))
    session = Session(checkpoint.load(), max_length=4, backend="reference")
    session.prefill([1, 2])


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def config_fields() -> dict[str, st.SearchStrategy[Any]]:
    rope = changed(ROPE, {"rope_type": st.sampled_from(["linear", "yarn", "llama3", "default"])})
    return {
        "rope_scaling": rope,
        "rope_parameters": rope,
        "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        "sliding_window": st.integers(-2, 70),
        "use_sliding_window": st.booleans(),
        "layer_types": st.lists(st.sampled_from(["full_attention", "sliding_attention"])),
        "max_window_layers": scalars(),
        "head_dim": scalars(),
        "rope_theta": scalars(),
        "rms_norm_eps": scalars(),
        "eos_token_id": values(),
        "quantization_config": values(),
    }


@given(data=st.data())
def test_config(data: st.DataObject, folder: Path, copy: Path, home: Path) -> None:
    path = copy / "config.json"
    path.write_bytes(data.draw(json_files(read(folder / "config.json"), config_fields())))
    config = outcome(lambda: ModelConfig.from_file(path))
    if config is not None:
        assert chat_defaults(config).sparsity
    outcome(lambda: use(copy))


@given(data=st.data())
def test_rotary_scaling(data: st.DataObject, folder: Path, copy: Path, home: Path) -> None:
    path = copy / "config.json"
    original = read(folder / "config.json")
    config = {k: v for k, v in original.items() if not k.startswith("rope")}
    config["rope_scaling"] = data.draw(config_fields()["rope_scaling"])
    path.write_text(json.dumps(config))
    outcome(lambda: use(copy))


def safetensors_file(header: Any, content: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


@given(data=st.data())
def test_safetensors(data: st.DataObject, folder: Path, copy: Path, home: Path) -> None:
    path = copy / "model.safetensors"
    original = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(original[:8], "little")
    header, content = json.loads(original[8 : 8 + size]), original[8 + size :]
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F16", "BF16", "F32", "F64", "I8", "F8_E4M3", "F4", "X", 3]),
            "shape": st.lists(st.sampled_from([0, 1, 16, 32, 2**40, 2**63, -1]), max_size=3),
            "data_offsets": st.lists(
                st.sampled_from([0, 2, 64, len(content), 2**40, 2**64 - 1, -5]), max_size=3
            ),
        }
    )
    name = data.draw(st.sampled_from(sorted(header)))
    one = header[name]
    kind = data.draw(st.sampled_from(["entry", "field", "length", "bytes", "rename"]))
    if kind == "entry":
        spoilt_file = safetensors_file({**header, name: data.draw(entry | values())}, content)
    elif kind == "field":
        spoilt_file = safetensors_file({**header, name: data.draw(changed(one))}, content)
    elif kind == "length":
        length = data.draw(st.sampled_from([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
        spoilt_file = safetensors_file(header, content, length)
    elif kind == "rename":
        other = {data.draw(st.text()) if k == name else k: v for k, v in header.items()}
        spoilt_file = safetensors_file(other, content)
    else:
        spoilt_file = data.draw(spoilt(original, within=size + 8))
    path.write_bytes(spoilt_file)
    outcome(lambda: use(copy))


@given(data=st.data())
def test_index(data: st.DataObject, folder: Path, copy: Path, home: Path) -> None:
    outside = [
        "../config.json",
        "/etc/passwd",
        "a/../../b",
        "C:\\x",
        "..",
        ".",
        "~",
        "\0",
        "\ud800",
    ]
    shard = st.one_of(
        st.just("model.safetensors"),
        st.sampled_from([*outside, "config.json", "x" * 5000, ""]),
        values(),
    )
    weight_map = st.dictionaries(st.sampled_from("abc"), shard, min_size=1)
    index = {"metadata": {}, "weight_map": {}}
    content = data.draw(json_files(index, {"weight_map": weight_map}))
    (copy / "model.safetensors.index.json").write_bytes(content)
    outcome(lambda: use(copy))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def tokenizer_fields(name: str) -> dict[str, st.SearchStrategy[Any]]:
    if name == "tokenizer.json":
        return {}
    templates = st.sampled_from(
        ["{{ 1/0 }}", "{% if", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}", "x", ""]
    )
    classes = ["LlamaTokenizer", "Qwen2Tokenizer", "Evil", "PreTrainedTokenizerFast", "../x"]
    return {
        "chat_template": templates | values(),
        "tokenizer_class": st.sampled_from(classes),
        "auto_map": st.just({"AutoTokenizer": ["evil.Evil", None]}),
        "extra_special_tokens": values(),
        "added_tokens_decoder": values(),
    }


def talk(folder: Path, session: Session) -> None:
    tokenizer = load_tokenizer(folder, "the model")
    conversation = Conversation(
        session,
        tokenizer,
        Sampler(Sampling(temperature=0.0)),
        stop_token_ids=stop_token_ids((2,), tokenizer, ChatTemplate.of(tokenizer)),
    )
    list(conversation.answer("Hi", max_new_tokens=2))


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@given(data=st.data())
def test_tokenizer(data: st.DataObject, name: str, folder: Path, copy: Path, home: Path) -> None:
    decoder = Checkpoint(convert(source_of(folder), reporter=QUIET)).load()
    session = Session(decoder, max_length=64, backend="reference")
    content = data.draw(json_files(read(folder / name), tokenizer_fields(name)))
    (copy / name).write_bytes(content)
    outcome(lambda: talk(copy, session))


@given(data=st.data())
def test_generation_defaults(data: st.DataObject, folder: Path, home: Path) -> None:
    checkpoint = Checkpoint(convert(source_of(folder), reporter=QUIET))
    document = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "eos_token_id": 2}
    ids = st.lists(scalars(), max_size=3)
    content = data.draw(json_files(document, {"eos_token_id": ids}))
    (checkpoint.folder / "generation_config.json").write_bytes(content)

    def use_defaults() -> None:
        chosen = checkpoint.generation_defaults()
        sampling = Sampling(**sampling_defaults(chosen, chat_defaults(checkpoint.config)))
        Sampler(sampling).sample(torch.linspace(0, 1, 40))
        assert all(isinstance(token, int) for token in checkpoint.eos_token_ids)

    outcome(use_defaults)


@pytest.fixture(scope="module")
def converted(folder: Path, home: Path) -> tuple[Path, bytes]:
    """The model's checkpoint, and its manifest as it should be."""
    path = convert(source_of(folder), reporter=QUIET)
    return path, (path / "manifest.json").read_bytes()


@given(data=st.data())
def test_manifest(data: st.DataObject, folder: Path, converted: tuple[Path, bytes]) -> None:
    made, manifest = converted
    also = {
        "shards": st.dictionaries(st.sampled_from(["../x", "a", "\0"]), scalars()),
        "dtype": st.sampled_from(["float32", "nn", "no", "int8", "Tensor"]),
        "quantization": st.sampled_from(["int8", "int5"]) | values(),
        "rounding": values(),
        "kind": st.sampled_from(["profile"]),
    }
    content = data.draw(json_files(json.loads(manifest), also))
    (made / "manifest.json").write_bytes(content)

    def look() -> None:
        checkpoint = Checkpoint(made)
        assert checkpoint.nbytes >= 0
        assert isinstance(checkpoint.rounding, dict)
        checkpoint.load()

    outcome(look)
    assert convert(source_of(folder), reporter=QUIET) == made  # made again where it has to be
