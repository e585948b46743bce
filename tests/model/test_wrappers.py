"""The language model of a checkpoint that has a part for images besides, against transformers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from benchmark.commands import runner
from model.edits import edit_config, edit_weights
from model.families import FAMILIES
from model.sources import IDS, converted, logits, source_of

import teal_cli
from teal_cli.errors import TealError, UnsupportedError
from teal_cli.inference.detokenizer import printable
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import convert
from teal_cli.progress import Silent
from teal_cli.sparsified import put_thresholds

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "sliding_window": None,
}
_VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def wrapper(family: str, *, tied: bool, **more: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text: dict[str, Any] = {"model_type": family, **_TEXT, **more}
    if family == "ministral3":
        text["rope_parameters"] = dict(FAMILIES["ministral3"]["rope_parameters"])
    torch.manual_seed(0)
    config = Mistral3Config(
        text_config=text, vision_config=dict(_VISION), tie_word_embeddings=tied, eos_token_id=2
    )
    return Mistral3ForConditionalGeneration(config).eval()


def save(model: Any, folder: Path, names: str) -> Path:
    """A folder as transformers saves it, or with the names of its versions 4 and 5."""
    folder.mkdir()
    tiny.write_tokenizer(folder)
    model.save_pretrained(folder)
    before, after = {
        "as saved": ("", ""),
        "of 4": ("model.language_model.", "language_model.model."),
        "of 5": ("language_model.model.", "model.language_model."),
    }[names]

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            if before and name.startswith(before):
                weights[name.replace(before, after)] = weights.pop(name)
            elif names == "of 4" and name == "lm_head.weight":
                weights[f"language_model.{name}"] = weights.pop(name)

    edit_weights(rename)(folder)
    return folder


@pytest.mark.parametrize("names", ["as saved", "of 4", "of 5"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
@pytest.mark.parametrize("family", ["mistral", "ministral3"])
def test_equals_transformers(
    family: str, tied: bool, names: str, tmp_path: Path, teal_home: Path
) -> None:
    model = wrapper(family, tied=tied)
    folder = save(model, tmp_path / "model", names)
    checkpoint = converted(folder)
    decoder = checkpoint.load()
    expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(decoder), expected, atol=2e-5, rtol=1e-4)
    assert checkpoint.config.model_type == family
    assert checkpoint.config.tie_word_embeddings == tied
    assert checkpoint.eos_token_ids == (2,)
    assert ModelConfig.from_file(folder / "config.json") == checkpoint.config
    session = Session(decoder, max_length=len(IDS))
    assert session.backend == "numba"
    session.prefill(IDS[:20])
    rows = torch.stack([session.step(int(token)) for token in IDS[20:]])
    torch.testing.assert_close(rows, expected[20:], atol=2e-5, rtol=1e-4)


def test_fp8_with_one_factor_a_tensor(tmp_path: Path, teal_home: Path) -> None:
    """As the instruct models of Ministral 3 are stored: scalars, of activations too."""
    model = wrapper("ministral3", tied=False)
    linear = [name for name, _ in model.model.language_model.named_parameters() if "proj" in name]
    parts: dict[str, torch.Tensor] = {}
    for name in linear:
        weight = model.model.language_model.get_parameter(name)
        factor = weight.abs().max() / 448
        codes = (weight / factor).to(torch.float8_e4m3fn)
        weight.copy_(codes.float() * factor)
        module = "language_model.model." + name.removesuffix(".weight")
        parts |= {f"{module}.weight": codes, f"{module}.weight_scale_inv": factor}
        parts[f"{module}.activation_scale"] = torch.tensor(0.5)
    folder = save(model, tmp_path / "model", "of 4")
    edit_weights(lambda weights: weights.update(parts))(folder)
    whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    edit_config(
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": whole,
        }
    )(folder)
    expected = model(input_ids=IDS[None]).logits[0]
    found = logits(converted(folder).load())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_chat(
    tmp_path: Path,
    teal_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer

    model = wrapper("ministral3", tied=False, vocab_size=400)
    folder = save(model, tmp_path / "model", "as saved")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    ids = ids["input_ids"]
    said = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    chat = runner("chat", monkeypatch, capsys)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    fixed = ("-s", "0", "-t", "0", "--dtype", "float32", "-n", "12", "-p", "Hi")
    code, out, errors = chat(folder, *fixed)
    expected = printable(tokenizer.decode(said, skip_special_tokens=True)).strip()
    assert (code, out.strip()) == (0, expected), errors
    assert expected


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_a_config_that_says_nothing_of_ties(tied: bool, tmp_path: Path, teal_home: Path) -> None:
    """transformers assumes one then; a head that is there is one all the same."""
    model = wrapper("mistral", tied=tied)
    folder = save(model, tmp_path / "model", "of 4")
    raw = json.loads((folder / "config.json").read_text())
    del raw["tie_word_embeddings"]
    raw["text_config"].pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(raw))
    expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(converted(folder).load()), expected, atol=2e-5, rtol=1e-4)


def test_what_is_left_out_is_said(tmp_path: Path, teal_home: Path) -> None:
    notes: list[str] = []

    class Listener(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    folder = save(wrapper("mistral", tied=True), tmp_path / "model", "as saved")
    Checkpoint(convert(source_of(folder), reporter=Listener()))
    assert any("passed over" in note and "multi_modal_projector" in note for note in notes)


def test_sparsified_it_equals_our_decoder(tmp_path: Path, teal_home: Path) -> None:
    model = wrapper("mistral", tied=True)
    decoder = converted(save(model, tmp_path / "model", "as saved")).load()
    levels = torch.full((2, 7), 0.2)
    put_thresholds(model, levels, sparse_from=0)
    expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(decoder, levels), expected, atol=1e-4, rtol=1e-4)
    teal_cli.unsparsify(model)
    assert not torch.equal(model(input_ids=IDS[None]).logits[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"text_config": {"model_type": "mistral4"}}, UnsupportedError, "'mistral4'"),
        ({"text_config": None}, TealError, "text_config"),
        ({"model_type": "llava"}, UnsupportedError, "'llava'"),
    ],
    ids=["another-family", "no-text", "another-wrapper"],
)
def test_what_is_no_language_model_of_ours_is_named(
    change: dict[str, Any],
    error: type[TealError],
    match: str,
    tmp_path: Path,
    teal_home: Path,
) -> None:
    folder = save(wrapper("mistral", tied=True), tmp_path / "model", "as saved")
    edit_config(**change)(folder)
    with pytest.raises(error, match=match):
        converted(folder)
    assert not list(teal_home.rglob("*.safetensors"))
