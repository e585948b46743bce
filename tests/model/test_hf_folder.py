"""Which tensors of a Hugging Face folder count: heads, indices, names, and what is left over."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.edits import edit_config, edit_weights
from model.families import hf_model
from model.sources import IDS, converted, logits, save_folder, source_of
from reporters import Notes
from safetensors.torch import load_file, save_file

from teal_cli.errors import TealError, UsageError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.progress import Silent


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return save_folder(hf_model("llama").to(torch.float16), tmp_path / "tiny")


SPARE: dict[str, tuple[Callable[[Path], None], str]] = {
    "layers-beyond": (
        edit_config(num_hidden_layers=2),
        r"passed over.*of 2 layers.*model\.layers\.2\..* and 8 more$",
    ),
    "value-head": (
        edit_weights(lambda w: w.update({"v_head.summary.weight": torch.ones(1, 64)})),
        "passed over.*v_head.summary.weight$",
    ),
    "prediction-head": (
        edit_weights(lambda w: w.update({"model.mtp.proj.weight": torch.ones(2, 2)})),
        "passed over.*model.mtp.proj.weight$",
    ),
}


@pytest.mark.parametrize("case", SPARE)
def test_tensors_that_the_model_does_not_use_are_named(
    case: str, tiny_folder: Path, teal_home: Path
) -> None:
    from transformers import AutoModelForCausalLM

    edit, match = SPARE[case]
    edit(tiny_folder)
    reporter = Notes()
    folder = convert(source_of(tiny_folder), dtype="float32", reporter=reporter)
    assert any(re.search(match, note) for note in reporter.notes), reporter.notes
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits(Checkpoint(folder).load()), expected, atol=2e-5, rtol=1e-4)


def head_apart(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])


def head_equal(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def head_alone(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("change", "tied"), [(head_apart, False), (head_equal, True), (head_alone, True)]
)
def test_the_stored_head_wins_over_the_flag(
    change: Callable[[dict[str, torch.Tensor]], None],
    tied: bool,
    tmp_path: Path,
    teal_home: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_folder(hf_model("llama-tied"), tmp_path / "model")
    edit_weights(change)(folder)
    checkpoint = converted(folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS[None]).logits[0]
    torch.testing.assert_close(logits(checkpoint.load()), expected, atol=2e-5, rtol=1e-4)
    assert checkpoint.config.tie_word_embeddings is tied
    names = {name for name, _ in checkpoint.load().weights.named_tensors()}
    assert ("lm_head" in names) is not tied


def test_checkpoints_of_an_older_reading_are_made_again(tmp_path: Path, teal_home: Path) -> None:
    folder = save_folder(hf_model("llama-tied"), tmp_path / "model")
    before = converted(folder)

    def age(checkpoint: Checkpoint, **config: Any) -> None:
        edit_config(**config)(checkpoint.folder)
        path = checkpoint.folder / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["reading"]
        path.write_text(json.dumps(manifest))

    age(before)
    assert Checkpoint(before.folder).reading == converted(folder).reading == 1  # it is still right
    edit_weights(head_apart)(folder)
    after = converted(folder)
    age(after, tie_word_embeddings=True)  # what an older version made of this folder
    assert converted(folder).config.tie_word_embeddings is False


def test_one_file_wins_over_an_index(tiny_folder: Path, teal_home: Path) -> None:
    before = converted(tiny_folder)
    weights = load_file(tiny_folder / "model.safetensors")
    stale = {name: tensor + 1 for name, tensor in weights.items()}
    shard = "model-00001-of-00001.safetensors"
    save_file(stale, tiny_folder / shard)
    index = {"weight_map": dict.fromkeys(stale, shard)}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert converted(tiny_folder).fingerprint == before.fingerprint
    (tiny_folder / shard).unlink()
    assert converted(tiny_folder, force=True).fingerprint == before.fingerprint
    edit_config(transformers_weights="other.safetensors")(tiny_folder)
    save_file(stale, tiny_folder / "other.safetensors")
    assert converted(tiny_folder).fingerprint != before.fingerprint  # what the config names


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("self_attn", "_orig_mod.self_attn"),
        lambda name: f"module.{name}",
    ],
    ids=["headless", "nested", "compiled", "compiled-layers", "parallel"],
)
def test_names_as_they_were_saved(
    rename: Callable[[str], str], tiny_folder: Path, teal_home: Path
) -> None:
    before = converted(tiny_folder)
    edit_weights(lambda w: [w.update({rename(n): w.pop(n)}) for n in [*w]])(tiny_folder)
    assert converted(tiny_folder).fingerprint == before.fingerprint


def shrink(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [shrink, touch, Path.unlink, lambda path: path.write_bytes(b"")])
def test_files_that_change_while_they_are_read(
    change: Callable[[Path], None], tiny_folder: Path, teal_home: Path
) -> None:
    class Meddler(Silent):
        def note(self, message: str) -> None:
            if message.startswith("converting"):
                change(tiny_folder / "model.safetensors")

    with pytest.raises(TealError, match="changed while they were read"):
        convert(source_of(tiny_folder), reporter=Meddler())
    assert not list(teal_home.rglob("*.safetensors"))


def test_old_files_carry_tensors_that_do_not_count(tmp_path: Path, teal_home: Path) -> None:
    folder = save_folder(hf_model("llama-tied"), tmp_path / "old")
    before = converted(folder)

    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    edit_weights(add)(folder)
    assert converted(folder).fingerprint == before.fingerprint


def test_values_beyond_float16(tmp_path: Path, teal_home: Path) -> None:
    model = hf_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    folder = save_folder(model, tmp_path / "wide")
    with pytest.raises(TealError, match="float16 cannot") as caught:
        converted(folder, dtype="float16")
    assert "bfloat16" in str(caught.value.hint)
    assert converted(folder).load().weights.norm[3] == 1e6
    with pytest.raises(UsageError, match="int8"):
        converted(folder, dtype="int8")


def test_a_failed_conversion_keeps_the_old_one(tiny_folder: Path, teal_home: Path) -> None:
    before = converted(tiny_folder)
    edit_weights(lambda w: w["model.norm.weight"].fill_(torch.nan))(tiny_folder)
    with pytest.raises(TealError, match=r"model\.norm\.weight"):
        converted(tiny_folder)
    assert Checkpoint(before.folder).fingerprint == before.fingerprint
    assert logits(before.load()).isfinite().all()
