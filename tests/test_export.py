"""`teal export`: transformers reads the folder, vLLM's plug-in its thresholds."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reporters import Notes
from safetensors.torch import load_file, save_file
from teal_kernels.tensors import RecoveryVectors
from vllm_plugin.check import exported_vectors

from teal_cli import app, console, export
from teal_cli.errors import MissingError, UnsupportedError, UsageError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import Nearest, convert
from teal_cli.model.quantization import quantization
from teal_cli.progress import Silent
from teal_cli.sparsified import put_thresholds
from teal_cli.sparsity import stored
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.recovery import BIASES, FIELDS, Recovery, own_vectors
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.store import hub, models
from teal_cli.vllm_plugin.thresholds import Place, Thresholds
from teal_cli.vllm_plugin.vectors import FILE


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


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_vectors_are_exported_for_transformers_names(
    teal_home: Path, tmp_path: Path, kind: str
) -> None:
    import tiny
    from transformers import AutoModelForCausalLM

    source = tiny.write_model(tmp_path / "source", model_type=kind, pad_token_id=0)
    [shard] = source.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.layers.0.input_layernorm.weight"][0] = 0  # such a weight stays as it is
    save_file(tensors, shard, {"format": "pt"})
    checkpoint = checkpoint_of(source, dtype="float32")
    decoder = checkpoint.load()
    own, generator = own_vectors(decoder), torch.Generator().manual_seed(0)
    learnt = {"norm": own.norm}
    for name in FIELDS[:-1]:
        noise = 0.2 * torch.randn(getattr(own, name).shape, generator=generator)
        learnt[name] = noise if name in BIASES else getattr(own, name) * (1 + noise)
    vectors = RecoveryVectors(**learnt)
    # Nothing is skipped, so that rounding flips no channel.
    levels = torch.full((checkpoint.config.num_hidden_layers, 7), -1.0)
    folder = tmp_path / "exported"
    config = write(checkpoint, folder, Setting("uniform", 0.4, levels, vectors))
    assert Thresholds.read(config["quantization_config"]).vectors
    assert not Thresholds.read(write(checkpoint, tmp_path / "b")["quantization_config"]).vectors

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(3, 12)
    with torch.inference_mode():
        dense = model(tokens[None]).logits[0]
        put_thresholds(model, levels, sparse_from=2, vectors=exported_vectors(model, folder))
        theirs = model(tokens[None]).logits[0]
        ours = decoder.forward(tokens, thresholds=levels, vectors=vectors, sparse_from=2)
        torch.testing.assert_close(theirs, decoder.logits(ours), atol=1e-4, rtol=1e-4)
    assert (theirs - dense)[2:].abs().mean() > 0.001


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
        "model.layers.1.self_attn.attn": None,
    }.items():
        place = Place.of(prefix)
        assert place is not None
        assert found.of(place) == levels
    assert Place.of("lm_head") is None
    dense = write(checkpoint, tmp_path / "b")["quantization_config"]
    assert Thresholds.read(dense).of(Place(1, ("q_proj", "k_proj", "v_proj"))) is None

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


@pytest.fixture
def run(teal_home: Path, monkeypatch: Any, capfd: Any) -> Callable[..., tuple[int, str, str]]:
    """`teal export` with words; the exit code and both streams."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", "export", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            app.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return command


def test_the_command_exports_vectors_unless_told_not_to(
    run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(tiny_model)
    decoder = checkpoint.load()
    rows = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    named = {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint}
    profile = calibrate(decoder, rows, **named, reporter=Silent())
    known = Recovery.nothing(decoder, {}).learnt(0.5, 0.1, own_vectors(decoder))
    profile.recovered("uniform", known).save(stored.profile_path(checkpoint))
    found = {}
    for name, flags in {"with": (), "without": ("--no-recover",)}.items():
        assert run(tiny_model, tmp_path / name, "-s", "0.4", *flags)[0] == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        found[name] = config["quantization_config"]
        assert (tmp_path / name / FILE).exists() is found[name]["vectors"] is (name == "with")
    # Each with the thresholds that reach the target with it.
    for name, recover in {"with": True, "without": False}.items():
        levels = profile.recovered("uniform", known).setting(0.4, recover=recover).thresholds
        assert levels is not None
        assert found[name]["thresholds"]["q_proj"] == levels[:, 0].tolist()
    assert found["with"]["thresholds"] != found["without"]["thresholds"]


def test_the_command_needs_a_profile_but_for_the_dense_model(
    run: Any, tiny_model: Path, tmp_path: Path
) -> None:
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
