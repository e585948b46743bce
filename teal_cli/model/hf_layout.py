"""How Hugging Face names and lays out a decoder's tensors, and how ours are made from them.

There a projection is [out_features, in_features] and stands alone; here it is transposed and
fused with those that read the same input.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.weights import tensor_shapes

_TOP = {
    "embed_tokens": ("model.embed_tokens.weight",),
    "norm": ("model.norm.weight",),
    "lm_head": ("lm_head.weight",),
}
_LAYER = {
    "input_layernorm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "post_attention_layernorm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
# In the place of theirs where a family has fused them.
_FUSED = {"qkv": ("self_attn.qkv_proj.weight",), "gate_up": ("mlp.gate_up_proj.weight",)}
_TRANSPOSED = ("qkv", "o", "gate_up", "down")


def parts(name: str, *, fused: bool) -> tuple[str, ...]:
    """Hugging Face's names of the tensors that make up ours of this name.

    Those that read the same input lie side by side there too, where they are `fused`.
    """
    if name in _TOP:
        return _TOP[name]
    _, index, kind = name.split(".")
    found = _FUSED[kind] if fused and kind in _FUSED else _LAYER[kind]
    return tuple(f"model.layers.{index}.{part}" for part in found)


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a Hugging Face checkpoint of this model must hold."""
    projections = config.projection_shapes | config.matrix_shapes
    outputs = {f"{name}_proj": shape for name, shape in projections.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        for part in parts(name, fused=config.fused):
            words = part.split(".")
            if words[-2] not in outputs:
                shapes[part] = shape
            elif words[-1] == "bias":
                shapes[part] = (outputs[words[-2]][1],)
            else:
                shapes[part] = outputs[words[-2]][::-1]
    return shapes


def assemble(name: str, shape: tuple[int, ...], tensors: Iterable[Tensor]) -> Tensor:
    """Our tensor of this name and shape out of Hugging Face's `parts(name)`, in their dtype.

    The parts are taken one by one, so that a generator keeps one of them in memory at a time.
    """
    if name.rpartition(".")[2] not in _TRANSPOSED:
        whole = list(tensors)
        return whole[0] if len(whole) == 1 else torch.cat(whole)
    out, start = None, 0
    for tensor in tensors:
        if out is None:
            out = tensor.new_empty(shape)
        out[:, start : start + len(tensor)] = tensor.T
        start += len(tensor)
    assert out is not None
    assert start == shape[1], name
    return out


def take_apart(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors out of ours of this name: what `assemble` made them of, as views."""
    shapes = hf_shapes(config)
    names = parts(name, fused=config.fused)
    if name.rpartition(".")[2] in _TRANSPOSED:
        tensor = tensor.T
    sizes = [shapes[part][0] for part in names]
    return dict(zip(names, tensor.split(sizes), strict=True))
