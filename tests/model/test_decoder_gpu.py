"""The decoder on a CUDA device, in its weights' dtype, against the same on a CPU in float32."""

from __future__ import annotations

import pytest
import torch
from model.families import hf_model, our_decoder

from teal_cli.model.decoder import Decoder
from teal_cli.model.weights import build_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral-window", "qwen2", "qwen3"])
@torch.no_grad()
def test_equals_the_cpu(family: str, sparse: bool, dtype: torch.dtype) -> None:
    host = our_decoder(hf_model(family), dtype)
    tensors = {name: tensor.cuda() for name, tensor in host.weights.named_tensors()}
    device = Decoder(host.config, build_weights(host.config, tensors.__getitem__))
    ids = torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(1))
    levels = torch.full((3, 7), 0.02) + 0.01 * torch.arange(7) if sparse else None
    on_device = None if levels is None else levels.cuda()
    expected = host.logits(host.forward(ids, thresholds=levels))

    full = device.logits(device.forward(ids.cuda(), thresholds=on_device))
    cache = device.new_cache(LENGTH)
    rows = [device.forward(ids[:30].cuda(), cache=cache, thresholds=on_device)]
    for position in range(30, LENGTH):
        one = ids[position : position + 1].cuda()
        rows.append(device.forward(one, cache=cache, position=position, thresholds=on_device))
    stepped = device.logits(torch.cat(rows))
    # Rounding grows through three layers of random weights, and may flip a channel at the
    # threshold: 0.03 worth of one input.
    eps = torch.finfo(dtype).eps
    bound = 40 * eps * expected.std() if not sparse else 60 * eps * expected.std() + 0.05
    for logits in (full, stepped):
        assert logits.dtype == torch.float32
        assert (logits.cpu() - expected).abs().max() < bound
