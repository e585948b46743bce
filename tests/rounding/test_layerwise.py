"""GPTQ through a tiny model: which inputs a layer is rounded on, and what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model.families import hf_model
from model.sources import save_folder, source_of, write_gguf
from safetensors.torch import load_file, save_file
from teal_kernels.quantized import QuantizedMatrix

from teal_cli.errors import TealError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import Nearest, Rounding, convert
from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.sites import SITE_OF
from teal_cli.progress import Silent
from teal_cli.rounding.gptq import gptq
from teal_cli.rounding.layerwise import Gptq

KIND = QUANTIZATIONS["int4"]
TOKENS = torch.randint(3, 97, (14, 60), generator=torch.Generator().manual_seed(0))
SEEN, UNSEEN = TOKENS[:12], TOKENS[12:]


def text(tokenizer: Any, config: ModelConfig) -> tuple[torch.Tensor, dict[str, Any]]:
    assert tokenizer("a")["input_ids"]
    return SEEN, {"dataset": "random", "dataset_part": "some", "dataset_fingerprint": "f"}


def compensated(**asked: Any) -> Gptq:
    return Gptq(KIND, text, torch.device("cpu"), asked)


def converted(path: Path, rounding: Rounding | None = None) -> Checkpoint:
    return Checkpoint(convert(source_of(path), rounding=rounding, reporter=Silent()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(hf_model("llama"), tmp_path / "tiny")


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_is_rounded_on_what_the_rounded_ones_before_it_give(
    layer: int, folder: Path, teal_home: Path
) -> None:
    plain, rounded = converted(folder).load(), converted(folder, compensated()).load()
    mixed = list(plain.weights.layers)
    mixed[:layer] = rounded.weights.layers[:layer]
    decoder = Decoder(plain.config, plain.weights)
    decoder.weights.layers[:] = mixed
    for name, site in (("qkv", "attn_in"), ("down", "mlp_act")):
        assert site == SITE_OF["q" if name == "qkv" else name]
        hessian = torch.zeros(())

        def observe(index: int, seen: str, x: torch.Tensor, site: str = site) -> None:
            nonlocal hessian
            if (index, seen) == (layer, site):
                hessian = hessian + x.T @ x

        with torch.no_grad():
            for window in SEEN:
                decoder.forward(window, observe=observe)
        expected = gptq(getattr(plain.weights.layers[layer], name), hessian, KIND.group)
        found = getattr(rounded.weights.layers[layer], name)
        assert isinstance(found, QuantizedMatrix)
        # Sums in another order move a code here and there, and what follows it.
        same = (found.rows == expected.rows).float().mean()
        assert same > 0.97


def test_it_is_nearer_to_the_float_model_than_plain_rounding(folder: Path, teal_home: Path) -> None:
    plain = converted(folder).load()
    errors = {}
    for name, rounding in (
        ("gptq", compensated()),
        ("nearest", Nearest(KIND, {"method": "nearest"})),
    ):
        decoder = converted(folder, rounding).load()
        with torch.no_grad():
            errors[name] = sum(
                float((decoder.forward(window) - plain.forward(window)).square().sum())
                for window in UNSEEN
            )
    assert errors["gptq"] < 0.9 * errors["nearest"]


def test_what_is_there_serves_where_nothing_else_is_asked(folder: Path, teal_home: Path) -> None:
    first = converted(folder, compensated())
    assert first.rounding["method"] == "gptq"
    assert first.rounding["dataset_fingerprint"] == "f"
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    assert converted(folder, Nearest(KIND)).fingerprint == first.fingerprint
    assert (first.folder / "manifest.json").stat().st_mtime_ns == written
    assert converted(folder, compensated(method="gptq")).fingerprint == first.fingerprint
    other = converted(folder, Nearest(KIND, {"method": "nearest"}))
    assert other.folder == first.folder
    assert other.fingerprint != first.fingerprint
    assert sorted(path.name for path in other.folder.iterdir() if path.is_dir()) == []


def test_the_source_may_be_gguf(tmp_path: Path, teal_home: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"))
    checkpoint = converted(path, compensated())
    assert checkpoint.rounding["method"] == "gptq"
    assert checkpoint.load().weights.quantization == KIND


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_what_is_not_finite_is_one_error_and_leaves_nothing(
    value: float, folder: Path, teal_home: Path
) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[11] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(TealError, match=r"up_proj|input of down is not finite"):
        converted(folder, compensated())
    assert not list(teal_home.rglob("*.safetensors"))
    assert not list(teal_home.rglob("*.bin"))
