"""What sparse rows of vLLM's layers get beside thresholds, where there is no vLLM."""

from __future__ import annotations

import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import hub_server
import pytest
import torch
from safetensors.torch import load_file, save_file
from teal_kernels.reference import sparse_project
from torch import Tensor

from teal_cli.vllm_plugin import vectors
from teal_cli.vllm_plugin.product import sparse_product

HEAD, QUERIES, KEYS, HIDDEN, INTER = 4, 8, 2, 24, 40
WIDTHS = {
    "qkv": (QUERIES * HEAD, KEYS * HEAD, KEYS * HEAD),
    "o": (HIDDEN,),
    "gate_up": (INTER, INTER),
    "down": (HIDDEN,),
}
NAMES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
INPUTS = {"qkv": HIDDEN, "o": QUERIES * HEAD, "gate_up": HIDDEN, "down": INTER}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Vectors of two layers."""
    torch.manual_seed(0)
    found = {
        f"{name}.bias": torch.randn(2, width)
        for layer, names in NAMES.items()
        for name, width in zip(names, WIDTHS[layer], strict=True)
    }
    found |= {f"{site}.factor": 0.5 + torch.rand(2, HIDDEN) for site in ("attn_in", "mlp_in")}
    save_file(found, tmp_path / "vectors.safetensors")
    return tmp_path / "vectors.safetensors"


def inputs_of(layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's x [3, K], weight [K, N] and thresholds."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, INPUTS[layer], generator=generator).to(dtype)
    weight = torch.randn(INPUTS[layer], sum(WIDTHS[layer]), generator=generator).to(dtype)
    return x, weight, torch.tensor([0.5, 0.6, 0.55][: len(WIDTHS[layer])])


def expected(
    file: Path, layer: str, x: Tensor, weight: Tensor, thresholds: Tensor, site: str | None
) -> Tensor:
    """The whole layer's output for x, float32, by the specification."""
    stored = load_file(file)
    wide = x.float() if site is None else x.float() * stored[f"{site}.factor"][1]
    offsets = (0, *accumulate(WIDTHS[layer]))
    rows = [sparse_project(row, weight.float(), offsets, thresholds) for row in wide]
    return torch.stack(rows) + torch.cat([stored[f"{name}.bias"][1] for name in NAMES[layer]])


def columns(whole: Tensor, layer: str, rank: int, ranks: int) -> tuple[list[int], Tensor]:
    """A rank's widths and its columns of whole heads and parts, as vLLM shares them out."""
    shares = [max(width // ranks, HEAD) for width in WIDTHS[layer]]
    own = []
    for projection, width, share in zip(
        whole.split(WIDTHS[layer], dim=1), WIDTHS[layer], shares, strict=True
    ):
        replicas = ranks * share // width  # ranks that have the same columns
        own.append(projection.split(share, dim=1)[rank // replicas])
    return shares, torch.cat(own, dim=1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4])  # of four, two have the same keys and values
@pytest.mark.parametrize(("layer", "site"), [("qkv", "attn_in"), ("gate_up", "mlp_in")])
def test_a_ranks_outputs_are_its_part_of_the_whole(
    layer: str, site: str, ranks: int, dtype: torch.dtype, file: Path
) -> None:
    x, weight, thresholds = inputs_of(layer, dtype)
    whole = expected(file, layer, x, weight, thresholds, site)
    found = vectors.read(file, 1, NAMES[layer])
    for rank in range(ranks):
        widths, rows = columns(weight, layer, rank, ranks)
        bias = found.bias(widths, rank, ranks)
        product = sparse_product(rows, widths, thresholds, factor=found.factor, bias=bias)
        _, right = columns(whole, layer, rank, ranks)
        y = product(x)
        assert y.dtype == dtype
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), right, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("layer", ["o", "down"])
def test_ranks_that_divide_the_inputs_add_up_to_the_whole(
    layer: str, ranks: int, file: Path
) -> None:
    x, weight, thresholds = inputs_of(layer, torch.float32)
    found = vectors.read(file, 1, NAMES[layer])
    assert found.factor is None
    total = torch.zeros(3, HIDDEN)
    for rank, (part, rows) in enumerate(zip(x.chunk(ranks, 1), weight.chunk(ranks), strict=True)):
        bias = found.bias([HIDDEN], rank, ranks) if rank == 0 else None
        product = sparse_product(rows, [HIDDEN], thresholds, factor=None, bias=bias)
        total += product(part.contiguous())
    whole = expected(file, layer, x, weight, thresholds, None)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_a_file_that_is_missing_or_does_not_fit_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export the model again"):
        vectors.read(tmp_path / "none.safetensors", 0, ["q_proj"])
    with pytest.raises(ValueError, match="export the model again"):
        vectors.read(file, 2, ["q_proj"])
    with pytest.raises(ValueError, match="export the model again"):
        vectors.read(file, 0, ["x_proj"])
    found = vectors.read(file, 0, NAMES["qkv"])
    for widths in ((32, 8, 5), (32, 8, 16), (8, 8, 8)):
        with pytest.raises(ValueError, match="export the model again"):
            found.bias(widths, 0, 2)


def test_it_is_found_in_the_models_folder_or_on_the_hub(file: Path, tmp_path: Path) -> None:
    assert vectors.find(str(tmp_path), None, None) == tmp_path / vectors.FILE
    with hub_server.running() as hub:
        hub.repositories["org/model"] = hub_server.Repository({vectors.FILE: file.read_bytes()})
        code = (
            "from teal_cli.vllm_plugin import vectors;"
            f"print(vectors.find('org/model', 'main', {str(tmp_path / 'cache')!r}))"
        )
        command, environment = [sys.executable, "-c", code], hub.environment(tmp_path)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found = Path(done.stdout.strip())
    assert found.is_relative_to(tmp_path / "cache"), done.stderr
    assert found.read_bytes() == file.read_bytes()
