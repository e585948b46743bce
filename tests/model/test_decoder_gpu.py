"""The decoder on a CUDA device, in its weights' dtype, against transformers in the same."""

from __future__ import annotations

import pytest
import torch
from model.families import hf_model, our_decoder
from teal_kernels.quantized import QuantizedMatrix

from teal_cli.model.decoder import Decoder
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.weights import build_weights
from teal_cli.rounding.gptq import gptq
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUANTIZATIONS)
@torch.no_grad()
def test_integers_on_the_device_are_the_hosts(name: str, dtype: torch.dtype) -> None:
    kind = QUANTIZATIONS[name]
    plain = our_decoder(hf_model("qwen2"), torch.float32)

    def host(wanted: str) -> torch.Tensor:
        return dict(plain.weights.named_tensors())[wanted]

    def rounded(wanted: str, device: str, kept: torch.dtype) -> object:
        whole = host(wanted)
        if kind.quantizes(wanted):
            return kind.round(wanted, whole.to(device)).to(device)
        return whole.to(device, kept)

    ours = Decoder(
        plain.config, build_weights(plain.config, lambda n: rounded(n, "cuda", dtype), kind)
    )
    oracle = Decoder(
        plain.config, build_weights(plain.config, lambda n: rounded(n, "cpu", torch.float32), kind)
    )
    ids = torch.randint(3, 97, (LENGTH,), generator=torch.Generator().manual_seed(1))
    thresholds = 0.2 + 0.05 * torch.arange(21.0).view(3, 7) / 3
    expected = oracle.logits(oracle.forward(ids))
    found = ours.logits(ours.forward(ids.cuda())).cpu()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert ours.forward(ids.cuda(), thresholds=thresholds.cuda()).isfinite().all()


@torch.no_grad()
def test_gptq_on_the_device_beats_rounding() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(300, 200, device="cuda", generator=generator)
    mix = torch.randn(300, 300, device="cuda", generator=generator)
    x = torch.randn(4096, 300, device="cuda", generator=generator) @ (
        mix / 17 + torch.eye(300, device="cuda")
    )
    nearest = QuantizedMatrix.int4(weight, 64).dequantize()
    found = gptq(weight, x.T @ x, 64).dequantize()
    assert (x @ (found - weight)).norm() < 0.9 * (x @ (nearest - weight)).norm()
