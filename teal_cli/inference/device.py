"""Which device a command runs on."""

from __future__ import annotations

import torch

from teal_cli.errors import UnsupportedError, UsageError


def pick_device(name: str = "auto") -> torch.device:
    """The device behind `auto` (the first GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: there is no such kind of device.
        UnsupportedError: this machine, or this build of torch, has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", hint="Use auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "no CUDA device can be used here",
            hint="Leave --device out, or install a build of torch for your GPU.",
        )
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UnsupportedError(
            f"there is no cuda:{index}: this machine has {torch.cuda.device_count()} GPU(s)"
        )
    return torch.device("cuda", index)
