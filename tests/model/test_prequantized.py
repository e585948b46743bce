"""Checkpoints that came quantized: what they decode to, and which are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.edits import edit_config, edit_weights
from model.families import hf_model
from model.packers import LAYOUTS, Layout, draw, gptq, mlx
from model.sources import save_folder, source_of
from safetensors.torch import load_file, save_file

from teal_cli.errors import TealError, UnsupportedError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.model.hf_folder import HfFolder
from teal_cli.progress import Silent

IDS = torch.arange(3, 43)


def tiny_model(**more: Any) -> Any:
    sizes = {"vocab_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    return hf_model("llama", **sizes, **more)


def quantized_folder(layout: Layout, folder: Path, model: Any = None) -> tuple[Path, Any]:
    """A folder in this layout, and the transformers model with the floats that it stands for."""
    model = model or tiny_model()
    save_folder(model, folder)
    torch.manual_seed(1)
    stored = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if "proj.weight" in name or (layout.embeddings and "norm" not in name):
            weight, parts = layout.pack(*parameter.shape)
            parameter.data.copy_(weight)
            del stored[name]
            stem = name.removesuffix("weight")
            stored |= {f"{stem}{part}": tensor for part, tensor in parts.items()}
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    edit_config(**layout.config)(folder)
    for name, content in layout.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder, model


@pytest.mark.parametrize("name", LAYOUTS)
def test_decodes_to_the_floats_that_it_stands_for(
    name: str, tmp_path: Path, teal_home: Path
) -> None:
    folder, model = quantized_folder(LAYOUTS[name], tmp_path / name)
    reader = HfFolder(folder)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            reader.read(key, torch.float32), parameter.data, atol=1e-6, rtol=1e-6
        )
    source = source_of(folder)
    checkpoint = Checkpoint(convert(source, dtype="float32", reporter=Silent()))
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
        decoder = checkpoint.load()
        got = decoder.logits(decoder.forward(IDS))
    torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=1e-3)
    written = json.loads((checkpoint.folder / "config.json").read_text())
    assert not {"quantization_config", "quantization", "compression_config"} & written.keys()


def test_the_config_names_the_dtype(tmp_path: Path, teal_home: Path) -> None:
    folder, model = quantized_folder(LAYOUTS["fp8-blocks"], tmp_path / "model")
    edit_config(dtype="bfloat16")(folder)
    checkpoint = Checkpoint(convert(source_of(folder), reporter=Silent()))
    assert checkpoint.dtype == torch.bfloat16
    down = model.model.layers[1].mlp.down_proj.weight
    assert checkpoint.load().weights.layers[1].down.equal(down.T.to(torch.bfloat16))  # one rounding


def test_modules_left_alone_and_those_with_settings_of_their_own(tmp_path: Path) -> None:
    folder, _ = quantized_folder(LAYOUTS["mlx"], tmp_path / "model")
    (own, parts), plain = mlx(8, 64)(64, 64), torch.randn(64, 96)

    def mix(stored: dict[str, torch.Tensor]) -> None:
        stored |= {f"model.layers.0.self_attn.q_proj.{part}": parts[part] for part in parts}
        for part in ("scales", "biases"):
            del stored[f"model.layers.1.mlp.down_proj.{part}"]
        stored["model.layers.1.mlp.down_proj.weight"] = plain

    edit_weights(mix)(folder)
    settings = {"model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 8}}
    settings["model.layers.1.mlp.down_proj"] = False  # type: ignore[assignment]
    edit_config(quantization={"group_size": 32, "bits": 4, **settings})(folder)
    reader = HfFolder(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(reader.read(name, torch.float32), own)
    assert reader.read("model.layers.1.mlp.down_proj.weight", torch.float32).equal(plain)


def test_a_tied_model_with_a_quantized_head_of_its_own(tmp_path: Path) -> None:
    folder, model = quantized_folder(LAYOUTS["gptq-lm_head"], tmp_path / "model")
    edit_config(tie_word_embeddings=True)(folder)
    reader = HfFolder(folder)
    assert reader.config["tie_word_embeddings"] is False
    torch.testing.assert_close(
        reader.read("lm_head.weight", torch.float32), model.lm_head.weight.data
    )


def test_autogptq_names_files_as_it_likes(tmp_path: Path) -> None:
    folder, model = quantized_folder(LAYOUTS["gptq-2023"], tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    norm = HfFolder(folder).read("model.norm.weight", torch.float32)
    assert norm.equal(model.model.norm.weight.data)


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_config(quantization_config={**config, **changes})(folder)

    return change


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[str, Callable[[Path], None], type[TealError], str]] = {
    "method": ("gptq", settings(quant_method="aqlm"), UnsupportedError, r"already \(aqlm\)"),
    "no-method": ("gptq", settings(quant_method=None, bits=None), UnsupportedError, "bits None"),
    "not-an-object": (
        "gptq",
        edit_config(quantization_config="4bit"),
        UnsupportedError,
        "unknown method",
    ),
    "marlin": ("gptq", settings(checkpoint_format="marlin"), UnsupportedError, "marlin"),
    "five-bits": ("gptq", settings(bits=5), UnsupportedError, "bits 5"),
    "three-bits-by-gptqmodel": (
        "gptq-by-gptqmodel",
        settings(bits=3),
        UnsupportedError,
        "3 bits by GPTQModel",
    ),
    "gemv": ("awq", settings(version="gemv"), UnsupportedError, "gemv"),
    "nvfp4": ("ct-int4", settings(format="nvfp4-pack-quantized"), UnsupportedError, "nvfp4"),
    "sparse": (
        "ct-int4",
        settings(sparsity_config={"format": "sparse-24-bitmask"}),
        UnsupportedError,
        "sparse-24",
    ),
    "rotated": ("ct-int4", settings(transform_config={"a": 1}), UnsupportedError, "rotations"),
    "mxfp4": (
        "mlx",
        edit_config(quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        UnsupportedError,
        "mxfp4",
    ),
    "nothing-says-how": (
        "gptq",
        edit_config(quantization_config=None),
        UnsupportedError,
        "says how",
    ),
    "signed-words": (
        "mlx",
        edit_weights(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].view(torch.int32)})),
        UnsupportedError,
        "stored as I32",
    ),
    "never-filled": (
        "gptq-2023",
        edit_weights(
            lambda t: (
                [t[f"{Q}.{part}"].zero_() for part in ("qweight", "qzeros")]
                and t[f"{Q}.scales"].fill_(1)
            )
        ),
        UnsupportedError,
        "nothing but -1",
    ),
    "scales-missing": ("gptq", edit_weights(lambda t: t.pop(f"{Q}.scales")), TealError, "lacks"),
    "scales-of-another": (
        "gptq",
        edit_weights(lambda t: t.update({f"{Q}.scales": torch.ones(3, 64)})),
        TealError,
        "do not fit",
    ),
    "groups-unsaid": (
        "gptq-without-g_idx",
        settings(group_size=-1),
        TealError,
        "do not fit",
    ),
    "group-beyond": (
        "gptq",
        edit_weights(lambda t: t[f"{Q}.g_idx"].fill_(9)),
        TealError,
        "groups that are not there",
    ),
    "blocks-of-another-size": (
        "fp8-blocks",
        settings(weight_block_size=[128, 128]),
        TealError,
        "do not fit",
    ),
    "half-a-state": (
        "bnb-nf4",
        edit_weights(lambda t: t.pop(f"{Q}.weight.quant_state.bitsandbytes__nf4")),
        UnsupportedError,
        "quant_state",
    ),
    "damaged-state": (
        "bnb-nf4",
        edit_weights(lambda t: t[f"{Q}.weight.quant_state.bitsandbytes__nf4"].fill_(65)),
        TealError,
        "damaged",
    ),
    "infinite-scale": (
        "gptq",
        edit_weights(lambda t: t[f"{Q}.scales"].fill_(torch.inf)),
        TealError,
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_by_name(fault: str, tmp_path: Path, teal_home: Path) -> None:
    layout, change, error, match = REFUSED[fault]
    folder, _ = quantized_folder(LAYOUTS[layout], tmp_path / "model")
    change(folder)
    with pytest.raises(error, match=match) as caught:
        convert(source_of(folder), reporter=Silent())
    if error is UnsupportedError:
        assert "quantized already" in str(caught.value)
    assert not list(teal_home.rglob("*.safetensors"))


# Parts that may be absent, or that say nothing of the weights.
OPTIONAL = ("g_idx", "weight_g_idx", "weight_zero_point", "weight_format", "input_scale")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_part_that_is_missing_or_cut_is_one_error(
    name: str, tmp_path: Path, teal_home: Path
) -> None:
    layout = LAYOUTS[name]
    folder, _ = quantized_folder(layout, tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    for part in (f"{Q}.{part}" for part in layout.pack(64, 64)[1]):
        cut = whole[part][..., :-1].contiguous() if whole[part].ndim else torch.ones(5)
        changes = {"cut": whole | {part: cut}}
        if not part.endswith(OPTIONAL):
            changes["missing"] = {key: whole[key] for key in whole if key != part}
        elif part.endswith("input_scale"):
            continue
        for tensors in changes.values():
            save_file(tensors, folder / "model.safetensors")
            with pytest.raises(TealError):
                convert(source_of(folder), dtype="float32", reporter=Silent())


def test_a_pruned_matrix_may_be_all_zero(tmp_path: Path) -> None:
    folder, _ = quantized_folder(LAYOUTS["gptq-2023"], tmp_path / "model")

    def zero(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{Q}.qweight"].fill_(0x11111111)
        stored[f"{Q}.qzeros"].zero_()

    edit_weights(zero)(folder)
    assert not HfFolder(folder).read(f"{Q}.weight", torch.float32).any()


def test_the_packers_differ_from_case_to_case() -> None:
    """The oracle is no oracle where codes, scales or zero points are the same throughout."""
    weight, parts = gptq(4, 16, act_order=True)(32, 64)
    assert len(weight.unique()) > 300
    assert parts["g_idx"].diff().abs().sum() > 10
    assert len(draw(8, 64, 3).unique()) == 8
