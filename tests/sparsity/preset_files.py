"""Packs a profile that was calibrated here as a built-in one: PROFILE.safetensors FILE.npz."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.quantiles import Quantiles

# Dense where thresholds are taken; towards the largest value the distance is halved each time.
SHARES = torch.cat(
    [torch.linspace(0, 0.95, 381).double(), 1 - 0.05 * 0.5 ** torch.arange(1, 13), torch.ones(1)]
).double()
TOP = 380  # where 0.95 lies
UNIT = 1e-4


def pack(profile: Profile, provenance: Mapping[str, Any]) -> bytes:
    """A profile in the form of README.md's table, `provenance` in place of its own."""
    values = _values(profile.quantiles)
    scale = values[..., TOP].float()
    content: dict[str, Any] = {
        "projections": numpy.array(profile.shape.projections, dtype=numpy.int32),
        "shares": SHARES.numpy(),
        "values": (values / scale[..., None]).half().numpy(),
        "scale": scale.numpy(),
        "provenance": numpy.array(json.dumps(provenance)),
    }
    for method, table in profile.allocations.items():
        levels = (table.double() / UNIT).round().long()
        steps = levels.diff(dim=0, prepend=torch.zeros_like(levels[:1]))
        content[f"{method}_steps"] = steps.numpy().astype(numpy.uint16)
    for method, table in profile.offsets.items():
        content[f"{method}_offsets"] = table.float().numpy()
    if profile.recovery:
        headers = {method: found.header() for method, found in profile.recovery.items()}
        for header in headers.values():
            header["provenance"] = _published(header["provenance"])
        content["recovery"] = numpy.array(json.dumps(headers))
    for method, found in profile.recovery.items():
        content |= {f"{method}_{name}": tensor.numpy() for name, tensor in found.tensors().items()}
    file = io.BytesIO()
    numpy.savez_compressed(file, **content)
    return file.getvalue()


def _published(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a text whose file is nobody else's."""
    made = {key: value for key, value in provenance.items() if "dataset" not in key}
    made.pop("settings", None)
    return {"dataset": "articles of English Wikipedia (built in)", **made}


def _values(quantiles: Quantiles) -> Tensor:
    """The abs(x) below which each of SHARES lies, float64 [num_hidden_layers, 4, SHARES]."""
    shares = quantiles.shares.contiguous()
    wanted = SHARES.expand(*shares.shape[:2], -1).contiguous()
    after = torch.searchsorted(shares, wanted).clamp(max=shares.shape[-1] - 1)
    before = (after - 1).clamp(min=0)
    x0, x1 = shares.gather(-1, before), shares.gather(-1, after)
    part = torch.where(x1 > x0, (wanted - x0) / (x1 - x0), 1.0).clamp(0, 1)
    return torch.lerp(quantiles.values.gather(-1, before), quantiles.values.gather(-1, after), part)


if __name__ == "__main__":
    calibrated = Profile.load(Path(sys.argv[1]))
    Path(sys.argv[2]).write_bytes(pack(calibrated, _published(calibrated.provenance)))
