"""Conversion from Hugging Face's format: what comes out, what is refused, what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model.edits import edit_config, edit_weights
from model.families import FAMILIES, hf_model
from model.sources import IDS, converted, logits, save_folder, source_of
from reporters import Notes
from safetensors.torch import load_file, save_file

from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model import convert as convert_module
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.config import ModelConfig
from teal_cli.model.convert import convert
from teal_cli.model.hf_layout import hf_shapes
from teal_cli.progress import Silent


def test_fingerprints_outlive_new_fields_of_the_config() -> None:
    """A profile belongs to a fingerprint; one made before a field was added must still fit."""
    plain = ModelConfig.from_dict(hf_model("llama3-rope").config.to_dict())
    text = json.loads(convert_module._canonical(plain))
    assert text.keys().isdisjoint({"hidden_act", "residual_multiplier", "layers_without_rope"})
    assert text["rope"].keys().isdisjoint({"truncate", "divisors", "partial_rotary_factor"})
    for family, field in (
        ("yarn-rope", "truncate"),
        ("divisors-rope", "divisors"),
        ("phi3-partial", "partial_rotary_factor"),
        ("phi3-longrope", "most_positions"),
        ("ministral3", "llama_4_scaling_beta"),
        ("granite", "embedding_multiplier"),
        ("granite", "attention_multiplier"),
        ("granite", "residual_multiplier"),
        ("granite", "logits_scaling"),
        ("smollm3", "layers_without_rope"),
    ):
        other = ModelConfig.from_dict(hf_model(family).config.to_dict())
        found = json.loads(convert_module._canonical(other))
        assert field in found | found["rope"]


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    return save_folder(hf_model("llama").to(torch.float16), tmp_path / "tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_equals_transformers(family: str, tmp_path: Path, teal_home: Path) -> None:
    model = hf_model(family)
    checkpoint = converted(save_folder(model, tmp_path / family))
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits(checkpoint.load()), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype: str, tiny_folder: Path, teal_home: Path) -> None:
    checkpoint = converted(tiny_folder, dtype=dtype)
    decoder = checkpoint.load()
    assert checkpoint.folder.name == dtype
    assert checkpoint.dtype == decoder.dtype == getattr(torch, dtype)
    stored = load_file(tiny_folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert decoder.weights.layers[1].down.equal(stored.T.to(decoder.dtype))
    assert converted(tiny_folder).dtype == torch.float16  # its own


def test_shards_in_and_out(
    tmp_path: Path, teal_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_model("llama-tied")
    single = converted(save_folder(model, tmp_path / "single"))
    sharded = save_folder(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 100_000)
    again = Checkpoint(convert(source_of(sharded, "sharded"), reporter=Silent()))
    shards = sorted(again.folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 101_000 for shard in shards)
    assert again.fingerprint == single.fingerprint
    assert logits(again.load()).equal(logits(single.load()))
    names = {name for shard in shards for name in load_file(shard)}  # the library reads our files
    assert names == {name for name, _ in again.load().weights.named_tensors()}
    assert "lm_head" not in names


def test_carries_tokenizer_and_defaults(tiny_folder: Path, teal_home: Path) -> None:
    (tiny_folder / "generation_config.json").write_text('{"eos_token_id": [2, 5], "top_k": 7}')
    (tiny_folder / "modeling_evil.py").write_text("raise SystemExit")
    checkpoint = converted(tiny_folder)
    assert checkpoint.eos_token_ids == (2, 5)
    assert checkpoint.generation_defaults()["top_k"] == 7
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer("Zwölf")["input_ids"]) == "Zwölf"
    assert "assistant" in tokenizer.chat_template
    assert not list(checkpoint.folder.glob("*.py"))
    (checkpoint.folder / "generation_config.json").unlink()
    assert checkpoint.eos_token_ids == (2,)  # config.json's


def test_skips_when_up_to_date(tiny_folder: Path, teal_home: Path) -> None:
    first = converted(tiny_folder)
    written = (first.folder / "manifest.json").stat().st_mtime_ns
    (shard,) = first.folder.glob("model-*")
    assert converted(tiny_folder).folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == written
    converted(tiny_folder, force=True)
    assert (first.folder / "manifest.json").stat().st_mtime_ns > written
    shard.write_bytes(shard.read_bytes()[:-1])  # a damaged result is made again
    with pytest.raises(TealError, match="cut short"):
        Checkpoint(first.folder)
    assert converted(tiny_folder).load().dtype == torch.float16
    weights = load_file(tiny_folder / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        tiny_folder / "model.safetensors",
    )
    assert converted(tiny_folder).fingerprint != first.fingerprint  # the source changed


def shard_named(name: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def cut(size: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return edit


def index_text(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def renamed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def meta_original(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")


def adapter_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


DOWN = "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], None], type[TealError], str]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), MissingError, "config.json"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), MissingError, "safetensors"),
    "unknown-type": (edit_config(model_type="mamba"), UnsupportedError, "mamba"),
    "truncated": (cut(5000), TealError, "truncated"),
    "truncated-at-the-end": (cut(-1), TealError, "truncated"),
    "truncated-header": (cut(20), TealError, "truncated"),
    "empty": (cut(0), TealError, "truncated"),
    "index-not-json": (index_text("{"), TealError, "not valid JSON"),
    "index-without-map": (index_text("{}"), TealError, "weight_map"),
    "shard-missing": (shard_named("model-2.safetensors"), MissingError, "model-2.safetensors"),
    "shard-outside": (shard_named("../model-1.safetensors"), TealError, "outside"),
    "shard-absolute": (shard_named("/etc/passwd"), TealError, "outside"),
    "shard-windows": (shard_named("..\\model-1.safetensors"), TealError, "outside"),
    "shard-not-text": (shard_named(7), TealError, "outside"),
    "nan": (edit_weights(lambda w: w[DOWN].view(-1)[7].fill_(torch.nan)), TealError, DOWN),
    "infinity": (edit_weights(lambda w: w[DOWN].view(-1)[-1].fill_(torch.inf)), TealError, DOWN),
    "tensor-missing": (edit_weights(lambda w: w.pop(DOWN)), TealError, f"lacks {DOWN}"),
    "bin-only": (renamed("pytorch_model.bin"), MissingError, "pickles"),
    "variant-only": (renamed("model.fp16.safetensors"), MissingError, r"only model\.fp16"),
    "mistral-format": (renamed("consolidated.safetensors"), UnsupportedError, "makers' own"),
    "meta-format": (meta_original, UnsupportedError, "makers' own"),
    "gptq-pickle": (renamed("llama-4bit-128g.pt"), MissingError, "pickles"),
    "mlx-2023": (renamed("weights.npz"), UnsupportedError, "MLX's format of 2023"),
    "adapter": (adapter_alone, UnsupportedError, r"adapter \(LoRA\) of org/base"),
    "adapter-beside": (
        edit_weights(lambda w: w.update({DOWN[:-6] + "lora_A.weight": torch.ones(2, 112)})),
        UnsupportedError,
        "beside the model",
    ),
    "weights-elsewhere": (
        edit_config(transformers_weights="../m.safetensors"),
        TealError,
        "outside",
    ),
    "vocabulary-larger": (edit_config(vocab_size=99), TealError, r"\[97, 64\].*\[99, 64\]"),
    "vocabulary-smaller": (edit_config(vocab_size=96), TealError, r"\[97, 64\].*\[96, 64\]"),
    "other-names": (
        edit_weights(lambda w: [w.update({f"backbone.{n}": w.pop(n)}) for n in [*w]]),
        TealError,
        "lacks lm_head.weight and",
    ),
    "two-names": (
        edit_weights(lambda w: w.update({"norm.weight": w["model.norm.weight"].clone()})),
        TealError,
        "twice",
    ),
    "shape": (edit_config(intermediate_size=128), TealError, r"shape \[112, 64\]"),
    "integers": (
        edit_weights(lambda w: w.update({DOWN: w[DOWN].to(torch.int8)})),
        UnsupportedError,
        "stored as I8, and nothing says",
    ),
    "experts": (
        edit_config(model_type="mixtral", num_local_experts=8),
        UnsupportedError,
        "mixture of experts",
    ),
    "experts-unsaid": (
        edit_weights(lambda w: w.update({"model.layers.1.mlp.experts.0.w1": w.pop(DOWN)})),
        UnsupportedError,
        "is a mixture of experts",
    ),
    "remote-code": (
        edit_config(model_type="odd", auto_map={"AutoModel": "m.M"}),
        UnsupportedError,
        "code of its own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_error_and_leave_nothing(
    fault: str, tiny_folder: Path, teal_home: Path
) -> None:
    edit, error, match = FAULTS[fault]
    edit(tiny_folder)
    with pytest.raises(error, match=match):
        converted(tiny_folder)
    assert not list(teal_home.rglob("*.safetensors"))
    assert not list(teal_home.rglob("config.json"))


def test_tampered_checkpoints_are_refused(tiny_folder: Path, teal_home: Path) -> None:
    checkpoint = converted(tiny_folder)
    with pytest.raises(MissingError):
        Checkpoint(checkpoint.folder.parent)
    edit_config(num_hidden_layers=2)(checkpoint.folder)
    with pytest.raises(TealError, match="not those of its config"):
        Checkpoint(checkpoint.folder).load()


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a program in a process of its own that sees what this one can import."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


_STALL = """
import sys, time
from pathlib import Path
from model.sources import source_of
from teal_cli.model import convert
from teal_cli.progress import Silent

def stall(*args, **kwargs):
    print("writing", flush=True)
    time.sleep(100)

write_shard = convert.write_shard
convert.write_shard = lambda *a, **k: (write_shard(*a, **k), stall())
convert.convert(source_of(Path(sys.argv[1])), reporter=Silent())
"""


def test_waits_for_another_process_and_survives_its_death(
    tiny_folder: Path, teal_home: Path
) -> None:
    other = start(_STALL, str(tiny_folder))
    assert other.stdout is not None
    assert other.stdout.readline() == "writing\n"

    class KillsWhenToldToWait(Notes):
        def note(self, message: str) -> None:
            super().note(message)
            if "waiting for it" in message:
                other.kill()

    reporter = KillsWhenToldToWait()
    folder = convert(source_of(tiny_folder), reporter=reporter)
    assert other.wait() != 0
    assert "waiting for it" in reporter.notes[0]
    assert logits(Checkpoint(folder).load()).isfinite().all()
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["float16"]


_MEASURE = """
import sys
from pathlib import Path
from model.sources import source_of
from teal_cli.model.convert import convert
from teal_cli.progress import Silent

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

convert(source_of(Path(sys.argv[1]), "warm-up"), dtype="float16", reporter=Silent())
source = source_of(Path(sys.argv[2]))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
convert(source, dtype="float16", reporter=Silent())
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_model(
    tiny_folder: Path, tmp_path: Path, teal_home: Path
) -> None:
    """0.1 GB of bfloat16 in tensors of at most 4 MB, copied to float16."""
    config = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    folder = tmp_path / "big"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(ModelConfig.from_dict(config))
    weights = {name: torch.full(shape, 0.1, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    total, largest = (f(tensor.nbytes for tensor in weights.values()) for f in (sum, max))
    process = start(_MEASURE, str(tiny_folder), str(folder))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert int(output) < 2 * largest + 30e6 < total / 2
