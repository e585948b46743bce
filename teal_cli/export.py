"""A checkpoint as an ordinary Hugging Face folder, thresholds in its config, vectors beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from teal_cli.errors import TealError, UnsupportedError, UsageError
from teal_cli.model.checkpoint import MANIFEST, Checkpoint
from teal_cli.model.convert import SHARD_BYTES
from teal_cli.model.hf_layout import hf_shapes, parts, take_apart
from teal_cli.model.shards import Stored, plan_shards, write_shard
from teal_cli.model.sites import FUSED, PROJECTIONS
from teal_cli.model.weights import tensor_shapes
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import Setting
from teal_cli.store import artifacts
from teal_cli.version import __version__
from teal_cli.vllm_plugin import vectors

QUANT_METHOD, FORMAT = "teal", 1


def check_folder(folder: Path) -> None:
    """Make sure that an export would overwrite nothing.

    Raises:
        UsageError: there is a file, or a folder that holds something.
    """
    hint = "Name a folder that is not there yet."
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder", hint=hint)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", hint=hint)


def export(
    checkpoint: Checkpoint,
    folder: Path,
    setting: Setting,
    profile: Profile | None,
    *,
    max_sequences: int,
    reporter: Reporter,
) -> None:
    """Write a folder that transformers reads as the dense model, and vLLM as the sparse one.

    Args:
        checkpoint: the model, not quantized.
        folder: a new one, or an empty one.
        setting: how sparse a step decodes that takes few sequences, and its vectors; dense leaves
            the model as it came.
        profile: where its thresholds come from; told in the config.
        max_sequences: with how many sequences a step still decodes sparsely.
        reporter: told what is written where.

    Raises:
        UsageError: the folder holds something.
        UnsupportedError: the checkpoint is quantized.
        TealError: the disk is full, or refuses.
    """
    check_folder(folder)
    config = checkpoint.config
    if checkpoint.quantization is not None:
        raise UnsupportedError(
            "a quantized model is not exported: the folder's tensors are transformers' own",
            hint="Leave --quantize out.",
        )
    shapes = hf_shapes(config)
    names = [part for name in tensor_shapes(config) for part in parts(name, fused=config.fused)]
    shards = plan_shards(
        {name: Stored(shapes[name], checkpoint.dtype) for name in names}, SHARD_BYTES
    )
    if len(shards) == 1:
        shards = {"model.safetensors": next(iter(shards.values()))}
    total_bytes = sum(stored.nbytes for plan in shards.values() for stored in plan.values())
    folder = folder.resolve()
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    what = f"exporting {checkpoint.name} in {dtype}, {total_bytes / 1e9:.2f} GB → {folder}"
    if came := raw.get("quantization_config"):
        what += f"; its {came.get('quant_method', 'quantized')} weights as the floats that they are"
    reporter.note(what)
    artifacts.check_free_space(folder, total_bytes)
    with artifacts.atomic_dir(folder) as temporary:
        for file in checkpoint.folder.iterdir():
            if file.suffix != ".safetensors" and file.name not in (MANIFEST, "config.json"):
                shutil.copyfile(file, temporary / file.name)
        tensors = _tensors(checkpoint)
        with reporter.task("Exporting", total_bytes, "B") as task:
            for name, plan in shards.items():
                own = islice(tensors, len(plan))
                write_shard(
                    temporary / name, plan, own, digest=hashlib.sha256(), progress=task.advance
                )
        if len(shards) > 1:
            index = {name: shard for shard, plan in shards.items() for name in plan}
            document = {"metadata": {"total_size": total_bytes}, "weight_map": index}
            _write(temporary / "model.safetensors.index.json", document)
        raw.pop("torch_dtype", None)
        raw["dtype"] = dtype
        raw["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        raw["tie_word_embeddings"] = config.tie_word_embeddings
        raw["quantization_config"] = _description(checkpoint, setting, profile, max_sequences)
        _write(temporary / "config.json", raw)
        if setting.vectors is not None:
            file = temporary / vectors.FILE
            file.parent.mkdir()
            save_file(_vectors(checkpoint, setting.vectors), file)


def _description(
    checkpoint: Checkpoint, setting: Setting, profile: Profile | None, max_sequences: int
) -> dict[str, Any]:
    """The config's `quantization_config`, as `teal_cli.vllm_plugin` reads it."""
    thresholds = None
    if setting.thresholds is not None:
        columns = setting.thresholds.T.tolist()
        thresholds = {f"{name}_proj": row for name, row in zip(PROJECTIONS, columns, strict=True)}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "sparsity": setting.target_sparsity,
        "method": setting.method,
        "max_sequences": max_sequences,
        "thresholds": thresholds,  # of each projection, a number a layer; None is dense
        "vectors": setting.vectors is not None,  # in a file
        "provenance": {
            "teal": __version__,
            "model": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "profile": None if profile is None else dict(profile.provenance),
        },
    }


def _tensors(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Hugging Face's tensors one after another, in the order of their names above."""
    names = list(tensor_shapes(checkpoint.config))
    for name, tensor in zip(names, _stored(checkpoint, names), strict=True):
        yield from take_apart(name, tensor, checkpoint.config).values()


def _stored(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[Tensor]:
    """A checkpoint's own tensors one after another."""
    files = [
        safe_open(path, framework="pt") for path in sorted(checkpoint.folder.glob("*.safetensors"))
    ]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
    for name in names:
        if name not in where:
            raise TealError(
                f"{checkpoint.folder} has no tensor {name}",
                hint="Make it again: `teal convert --force`.",
            )
        yield where[name].get_tensor(name)


def _vectors(checkpoint: Checkpoint, recovery: RecoveryVectors) -> dict[str, Tensor]:
    """What `vllm_plugin.vectors` reads: norms as factors of what the model's own hand on.

    The final norm's is left out: vLLM computes logits when the step that they belong to is over.
    """
    config = checkpoint.config
    widths = {
        "qkv": (config.q_size, config.kv_size, config.kv_size),
        "o": (config.hidden_size,),
        "gate_up": (config.intermediate_size,) * 2,
        "down": (config.hidden_size,),
    }
    found = {}
    for fused, names in FUSED.items():
        parts = getattr(recovery, fused).float().split(widths[fused], dim=1)
        for name, part in zip(names, parts, strict=True):
            found[f"{name}_proj.bias"] = part.contiguous()
    for site, norm in (("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm")):
        layers = [f"layers.{layer}.{norm}" for layer in range(config.num_hidden_layers)]
        own = torch.stack([weight.float() for weight in _stored(checkpoint, layers)])
        # What the model's own weight makes 0 no factor changes.
        learnt = getattr(recovery, norm).float()
        found[f"{site}.factor"] = torch.where(own == 0, 1.0, learnt / own)
    return found


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
