"""`teal export`: transformers reads the folder, vLLM's plug-in its thresholds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reporters import Notes

from teal_cli import app, console, export
from teal_cli.errors import MissingError, UnsupportedError, UsageError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import Nearest, convert
from teal_cli.model.quantization import quantization
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.store import hub, models
from teal_cli.vllm_plugin.thresholds import Thresholds


def checkpoint_of(folder: Path, **options: Any) -> Checkpoint:
    source = hub.fetch(models.resolve(str(folder)), reporter=Silent())
    return Checkpoint(convert(source, reporter=Silent(), **options))


def write(checkpoint: Checkpoint, folder: Path, setting: Setting = DENSE, most: int = 1) -> Any:
    export.export(checkpoint, folder, setting, None, max_sequences=most, reporter=Silent())
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("mistral", {}),
        ("qwen2", {"num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 32}),
        ("phi3", {"pad_token_id": 0}),
        ("granite", {"residual_multiplier": 0.5}),
        ("smollm3", {"pad_token_id": 0}),
        ("ministral3", {"head_dim": 32}),
    ],
)
def test_transformers_reads_the_same_model(
    teal_home: Path, tmp_path: Path, kind: str, changes: dict[str, Any], monkeypatch: Any
) -> None:
    import tiny
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny.write_model(tmp_path / "source", model_type=kind, **changes)
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)  # several files
    folder = tmp_path / "exported"
    config = write(checkpoint_of(source), folder, sparse(3), 2)
    assert config["quantization_config"]["quant_method"] == "teal"
    assert len([*folder.glob("*.safetensors")]) > 1
    models_ = [
        AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for place in (source, folder)
    ]
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (source, folder)]
    ids = tokenizers[0]("Grüße", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizers[1]("Grüße", return_tensors="pt")["input_ids"])
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models_))


def sparse(layers: int) -> Setting:
    return Setting("uniform", 0.4, torch.arange(layers * 7, dtype=torch.float32).view(layers, 7))


def test_the_plug_in_reads_what_was_exported(
    teal_home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tiny_model)
    setting = sparse(checkpoint.config.num_hidden_layers)
    content = write(checkpoint, tmp_path / "a", setting, 3)["quantization_config"]
    found = Thresholds.read(content)
    assert found.max_sequences == 3
    assert setting.thresholds is not None
    q, k, v, o, gate, up, down = setting.thresholds[1].tolist()
    for prefix, levels in {
        "model.layers.1.self_attn.qkv_proj": (q, k, v),
        "model.layers.1.self_attn.o_proj": (o,),
        "model.layers.1.mlp.gate_up_proj": (gate, up),
        "layers.1.mlp.down_proj": (down,),
        "lm_head": None,
        "model.layers.1.self_attn.attn": None,
    }.items():
        assert found.of(prefix) == levels
    dense = write(checkpoint, tmp_path / "b")["quantization_config"]
    assert Thresholds.read(dense).of("model.layers.1.self_attn.qkv_proj") is None

    for damage in (
        {"format": 2},
        {"format": None},
        {"thresholds": {"q_proj": [1.0]}},
        {"thresholds": {**content["thresholds"], "q_proj": [1.0]}},
        {"max_sequences": 0},
        {"max_sequences": "1"},
    ):
        with pytest.raises(ValueError, match="quantization_config"):
            Thresholds.read({**content, **damage})


def test_what_is_not_exported_is_said(teal_home: Path, tiny_model: Path, tmp_path: Path) -> None:
    kind = quantization("int8")
    assert kind is not None
    with pytest.raises(UnsupportedError, match="quantized"):
        write(checkpoint_of(tiny_model, rounding=Nearest(kind)), tmp_path / "q")
    checkpoint = checkpoint_of(tiny_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        write(checkpoint, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        write(checkpoint, tmp_path / "full" / "file")
    (tmp_path / "empty").mkdir()
    write(checkpoint, tmp_path / "empty")
    assert not [*tmp_path.glob(".*")]


def test_the_command_needs_a_profile_but_for_the_dense_model(
    teal_home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", "export", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            app.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    code, out, err = run(tiny_model, tmp_path / "a", "-s", "0.4")
    assert (code, out) == (MissingError.exit_code, "")
    assert "teal calibrate" in err
    code, out, _ = run(tiny_model, tmp_path / "a", "-s", "0")
    assert (code, out) == (0, f"{tmp_path / 'a'}\n")
    shutil.rmtree(tmp_path / "a")
    code, _, err = run("nowhere/to-be-found", tmp_path, "--offline")
    assert (code, "is not empty" in err) == (2, True)  # before a model is looked for


def test_weights_that_came_quantized_are_exported_as_floats(
    teal_home: Path, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tiny_model)
    place = checkpoint.folder / "config.json"
    raw = json.loads(place.read_text())
    place.write_text(json.dumps({**raw, "quantization_config": {"quant_method": "gptq"}}))
    reporter = Notes()
    export.export(checkpoint, tmp_path / "a", DENSE, None, max_sequences=1, reporter=reporter)
    assert any("its gptq weights as the floats that they are" in note for note in reporter.notes)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "teal"
    assert written["dtype"] == "float16"
