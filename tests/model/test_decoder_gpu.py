"""The decoder on a CUDA device, in its weights' dtype, against transformers in the same."""

from __future__ import annotations

import pytest
import torch
from model.families import hf_model, our_decoder

from teal_cli.model.decoder import Decoder
from teal_cli.model.weights import build_weights
from teal_cli.sparsified import put_thresholds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral-window", "qwen2", "qwen3"])
@torch.no_grad()
def test_as_exact_as_transformers(family: str, sparse: bool, dtype: torch.dtype) -> None:
    model = hf_model(family).to(dtype)
    host = our_decoder(model, dtype)
    tensors = {name: tensor.cuda() for name, tensor in host.weights.named_tensors()}
    device = Decoder(host.config, build_weights(host.config, tensors.__getitem__))
    ids = torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(1)).cuda()
    thresholds = None
    if sparse:
        thresholds = 0.2 + 0.05 * torch.arange(21.0).view(3, 7).cuda() / 3
        put_thresholds(model, thresholds, sparse_from=0)

    full = device.logits(device.forward(ids, thresholds=thresholds))
    cache = device.new_cache(LENGTH)
    rows = [device.forward(ids[:30], cache=cache, thresholds=thresholds)]
    for position in range(30, LENGTH):
        one = ids[position : position + 1]
        rows.append(device.forward(one, cache=cache, position=position, thresholds=thresholds))
    stepped = device.logits(torch.cat(rows))
    theirs = model.cuda()(ids[None]).logits[0]
    oracle = model.double()(ids[None]).logits[0]

    def error(logits: torch.Tensor) -> torch.Tensor:
        return (logits.double() - oracle).square().mean().sqrt()  # a channel may flip at its level

    allowed = 2 * error(theirs) + torch.finfo(torch.float32).eps * oracle.std()
    for logits in (full, stepped):
        assert logits.dtype == torch.float32
        assert error(logits) <= allowed
