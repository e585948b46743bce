"""GGUF files: what llama.cpp's converter would write comes out as the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.families import hf_model
from model.sources import IDS, converted, logits, source_of, write_gguf

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.convert import convert
from teal_cli.model.gguf import GgufFile
from teal_cli.progress import Silent

WIDE = {"intermediate_size": 128}  # Q4_1 and Q8_0 come in blocks of 32


def logits_of(path: Path, dtype: str | None = None) -> torch.Tensor:
    return logits(converted(path, dtype=dtype).load())


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-head-dim", "qwen2", "qwen3"])
def test_float_files_equal_the_model(family: str, tmp_path: Path, teal_home: Path) -> None:
    model = hf_model(family)
    path = write_gguf(tmp_path / "model.gguf", model)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path, "float32"), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_quantized_files_equal_the_dequantized_model(
    quantization: str, tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    from teal_cli.model import gguf_tensors

    monkeypatch.setattr(gguf_tensors, "_CHUNK_ELEMENTS", 640)  # ten rows at a time
    model = hf_model("qwen2", **WIDE)
    path = write_gguf(tmp_path / "model.gguf", model, quantization=quantization)
    kind = gguf.GGMLQuantizationType[quantization]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.dequantize(stored, kind)))
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(path, "float32"), expected, atol=2e-5, rtol=1e-4)
    own = Checkpoint(convert(source_of(path), reporter=Silent()))
    assert own.dtype == torch.float16


def test_config_is_the_one_that_was_meant(tmp_path: Path) -> None:
    model = hf_model("llama")
    config = GgufFile(write_gguf(tmp_path / "model.gguf", model)).config
    assert config["rms_norm_eps"] == 1e-05  # stored as 9.999999747e-06
    assert config["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is False
    assert config["vocab_size"] == 97
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    end = {"tokenizer.ggml.eot_token_id": 5}
    config = GgufFile(write_gguf(tmp_path / "eot.gguf", model, metadata=end)).config
    assert config["eos_token_id"] == [1, 5]
    ends = {"eos": 4, "eot": 4, "eom": 6, "padding": 10**6}
    end = {f"tokenizer.ggml.{name}_token_id": number for name, number in ends.items()}
    config = GgufFile(write_gguf(tmp_path / "ends.gguf", model, metadata=end)).config
    assert config["eos_token_id"] == [4, 6]
    assert "pad_token_id" not in config


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"split.count": 3}, "parts"),
    ],
    ids=["architecture", "split"],
)
def test_unsupported(metadata: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedError, match=match):
        GgufFile(write_gguf(path, hf_model("llama"), metadata=metadata))


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path, teal_home: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"), tokenizer={"pre": "of-tomorrow"})
    with pytest.raises(UnsupportedError, match="of-tomorrow"):
        logits_of(path)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -1], ids=str)
def test_truncated_files_are_one_error(size: int, tmp_path: Path, teal_home: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", hf_model("llama"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TealError, match="truncated"):
        logits_of(path)
    assert not list(teal_home.rglob("*.safetensors"))


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        GgufFile(tmp_path / "none.gguf")
    path = tmp_path / "text.gguf"
    path.write_text("This is not a GGUF file, but it is long enough to look into." * 9)
    with pytest.raises(TealError, match="not a GGUF"):
        GgufFile(path)


def test_missing_tensor_and_nan(tmp_path: Path, teal_home: Path) -> None:
    model = hf_model("llama")
    missing = {"blk.7.attn_q.weight": np.ones((2, 2), dtype=np.float32)}
    with pytest.raises(TealError, match="does not have"):
        logits_of(write_gguf(tmp_path / "extra.gguf", model, tensors=missing))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(TealError, match="NaN"):
        logits_of(write_gguf(tmp_path / "nan.gguf", model))
