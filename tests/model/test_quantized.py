"""Quantized checkpoints: equal to transformers on the rounded weights, from either format."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from model.families import FAMILIES, hf_model
from model.sources import IDS, converted, logits, save_folder, source_of, write_gguf
from safetensors.torch import load_file, save_file
from teal_kernels.quantized import QuantizedMatrix, QuantizedRows

from teal_cli import options
from teal_cli.benchmark.cost import weight_bytes
from teal_cli.benchmark.transformers_baseline import transformers_model
from teal_cli.errors import TealError, UnsupportedError, UsageError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import Nearest, convert
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS, quantization
from teal_cli.model.random_weights import random_decoder
from teal_cli.model.sites import FUSED
from teal_cli.model.weights import floats
from teal_cli.progress import Silent


def rounded(path: Path, name: str, **options: Any) -> Checkpoint:
    rounding = Nearest(QUANTIZATIONS[name])
    return converted(path, rounding=rounding, **options)


def in_floats(decoder: Decoder) -> Decoder:
    """The same model with every integer turned to float32."""
    weights = decoder.weights
    layers = [
        dataclasses.replace(
            layer, **{name: floats(getattr(layer, name), torch.float32) for name in FUSED}
        )
        for layer in weights.layers
    ]
    head = floats(weights.lm_head, torch.float32)
    return Decoder(decoder.config, dataclasses.replace(weights, layers=layers, lm_head=head))


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return save_folder(hf_model("llama").to(torch.float16), tmp_path / "tiny")


def test_the_option_offers_what_there_is() -> None:
    assert get_args(options.Quantize) == tuple(QUANTIZATIONS)
    assert [kind.name for kind in QUANTIZATIONS.values()] == list(QUANTIZATIONS)
    assert quantization(None) is None
    with pytest.raises(UsageError, match="no quantization 'int3'"):
        quantization("int3")


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "qwen3"])
def test_equals_transformers_on_the_rounded_weights(
    family: str, name: str, tmp_path: Path, teal_home: Path
) -> None:
    checkpoint = rounded(save_folder(hf_model(family), tmp_path / family), name)
    decoder = checkpoint.load()
    assert checkpoint.quantization == decoder.weights.quantization == QUANTIZATIONS[name]
    assert checkpoint.folder.name == f"float32-{name}"
    if not (QUANTIZATIONS[name].head and FAMILIES[family].get("tie_word_embeddings")):
        model = transformers_model(decoder, torch.float32)  # from the dequantized tensors
        with torch.no_grad():
            expected = model(IDS[None]).logits[0]
        torch.testing.assert_close(logits(decoder), expected, atol=2e-5, rtol=1e-4)
    thresholds = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    for levels in (None, thresholds, thresholds[:, :1].expand(-1, 7)):
        expected = logits(in_floats(decoder), levels)
        torch.testing.assert_close(logits(decoder, levels), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["int8+head", "int4+head", "int4-128"])
def test_files_hold_the_rounded_source(name: str, tiny_folder: Path, teal_home: Path) -> None:
    kind = QUANTIZATIONS[name]
    checkpoint = rounded(tiny_folder, name)
    decoder = checkpoint.load()
    stored = load_file(tiny_folder / "model.safetensors")
    down = stored["model.layers.1.mlp.down_proj.weight"].T
    expected = QuantizedMatrix.int4(down, kind.group) if kind.group else QuantizedMatrix.int8(down)
    found = decoder.weights.layers[1].down
    assert isinstance(found, QuantizedMatrix)
    assert found.rows.equal(expected.rows)
    head = decoder.weights.lm_head
    if kind.head:
        assert isinstance(head, QuantizedRows)
        assert head.rows.equal(QuantizedRows.int8(stored["lm_head.weight"]).rows)
    assert decoder.weights.nbytes == weight_bytes(decoder.config, 2, kind)
    shard = next(checkpoint.folder.glob("model-*"))
    assert 0 <= checkpoint.nbytes - decoder.weights.nbytes < 10_000  # the header
    assert shard.stat().st_size < (tiny_folder / "model.safetensors").stat().st_size
    assert checkpoint.rounding == {"method": "nearest"}


def test_a_tied_head_is_the_rounded_embedding(tmp_path: Path, teal_home: Path) -> None:
    folder = save_folder(hf_model("llama-tied"), tmp_path / "tied")
    weights = rounded(folder, "int8+head").load().weights
    assert isinstance(weights.lm_head, QuantizedRows)
    assert weights.lm_head.rows.equal(QuantizedRows.int8(weights.embed_tokens).rows)
    assert rounded(folder, "int8").load().weights.lm_head.shape == weights.embed_tokens.shape


def test_gguf_and_safetensors_give_the_same_integers(tmp_path: Path, teal_home: Path) -> None:
    model = hf_model("llama").to(torch.float16)
    folder = save_folder(model, tmp_path / "folder")
    gguf = write_gguf(tmp_path / "model.gguf", model)
    first, second = (rounded(path, "int4+head").load().weights for path in (folder, gguf))
    for (name, ours), (other, theirs) in zip(
        first.named_tensors(), second.named_tensors(), strict=True
    ):
        assert name == other
        if isinstance(ours, QuantizedMatrix | QuantizedRows):
            assert ours.rows.equal(theirs.rows)


def test_each_way_of_storing_has_a_folder_of_its_own(tiny_folder: Path, teal_home: Path) -> None:
    plain = Checkpoint(convert(source_of(tiny_folder), reporter=Silent()))
    names = ("int8", "int4", "int4-128", "int8+head")
    checkpoints = [plain, *(rounded(tiny_folder, name) for name in names)]
    assert len({checkpoint.fingerprint for checkpoint in checkpoints}) == 5
    assert len({checkpoint.folder for checkpoint in checkpoints}) == 5
    manifest = json.loads((checkpoints[1].folder / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["quantization"]) == ("float16", "int8")
    written = (checkpoints[1].folder / "manifest.json").stat().st_mtime_ns
    rounded(tiny_folder, "int8")
    assert (checkpoints[1].folder / "manifest.json").stat().st_mtime_ns == written


def test_zero_constant_and_outlier_columns(tiny_folder: Path, teal_home: Path) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down[3], down[:, 5], down[7], down[9, 9] = 0, 0, 2.5, 6e4
    save_file(weights, tiny_folder / "model.safetensors")
    for name in ("int8", "int4"):
        found = floats(rounded(tiny_folder, name).load().weights.layers[1].down, torch.float32)
        assert found.isfinite().all()
        assert not found[5, :7].any()
        error = (found - down.T).abs()
        if name == "int8":
            assert not found[:, 3].any()
            torch.testing.assert_close(found[:, 7], down[7].float())
            assert error[:, :9].max() < 0.02  # the outlier spoils its own column alone
        else:
            others = [column for column in range(64) if column not in (7, 9)]
            assert error[:, others][[row for row in range(112) if row != 9]].max() < 0.2


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(
    name: str, value: float, tiny_folder: Path, teal_home: Path
) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"].view(-1)[11] = value
    save_file(weights, tiny_folder / "model.safetensors")
    with pytest.raises(TealError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        rounded(tiny_folder, name)
    assert not list(teal_home.rglob("*.safetensors"))
    assert not list(teal_home.rglob("config.json"))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_widths_that_do_not_fit_are_one_sentence(
    name: str, tmp_path: Path, teal_home: Path
) -> None:
    folder = save_folder(hf_model("llama"), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    shape = ModelConfig.from_dict({**config, "hidden_size": 60, "head_dim": 16})
    message = f"{name} needs matrices with a multiple of 8 outputs, and o of this model has 60"
    with pytest.raises(UnsupportedError, match=message):
        random_decoder(shape, device="cpu", dtype=torch.float16, seed=0, kind=QUANTIZATIONS[name])


def test_damaged_and_foreign_tensors_are_refused(tiny_folder: Path, teal_home: Path) -> None:
    checkpoint = rounded(tiny_folder, "int8")
    manifest = checkpoint.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "quantization": "int4"}))
    with pytest.raises(TealError, match="not those of its config"):
        Checkpoint(checkpoint.folder).load()
    manifest.write_text(json.dumps({**content, "quantization": "int3"}))
    with pytest.raises(TealError, match="quantization is missing or wrong"):
        Checkpoint(checkpoint.folder).load()
    manifest.write_text(json.dumps(content))
    (shard,) = checkpoint.folder.glob("model-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(TealError, match="cut short"):
        Checkpoint(checkpoint.folder)
    assert rounded(tiny_folder, "int8").load().weights.quantization == QUANTIZATIONS["int8"]


def test_the_format_without_scales_of_columns_is_made_anew(
    tiny_folder: Path, teal_home: Path
) -> None:
    checkpoint = rounded(tiny_folder, "int4")
    manifest = checkpoint.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["schema"] == 2
    manifest.write_text(json.dumps({**content, "schema": 1}))
    with pytest.raises(TealError, match="has format 1, this version of teal reads 2"):
        Checkpoint(checkpoint.folder)
    assert rounded(tiny_folder, "int4").fingerprint == checkpoint.fingerprint


@pytest.mark.parametrize("name", ["int8", "int4-128+head"])
def test_random_weights_are_made_as_integers(name: str) -> None:
    config = ModelConfig.from_dict(
        {**FAMILIES["llama"], "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    )
    kind = QUANTIZATIONS[name]
    decoder = random_decoder(config, device="cpu", dtype=torch.float16, seed=0, kind=kind)
    assert decoder.weights.quantization == kind
    plain = random_decoder(config, device="cpu", dtype=torch.float16, seed=0)
    expected = kind.round("layers.1.o", plain.weights.layers[1].o)
    assert decoder.weights.layers[1].o.rows.equal(expected.rows)
