"""Where a calibration's passes keep their hidden states: one folder a pass, or memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.model.decoder import Decoder
from teal_cli.sparsity.spool import DiskStates, MemoryStates, States


@dataclass(frozen=True, slots=True)
class Workspace:
    """Names the run that may resume what is in `folder`; None works in memory."""

    folder: Path | None
    fingerprint: str | None  # of the checkpoint

    def dense_states(self, decoder: Decoder, windows: Tensor, *, keep_all: bool) -> States:
        """States of the pass through the dense model that histograms are made in."""
        return self.states("histograms", decoder, windows, keep_all=keep_all)

    def states(
        self,
        name: str,
        decoder: Decoder,
        windows: Tensor,
        *,
        depends_on: Tensor | None = None,
        keep_all: bool = False,
    ) -> States:
        """States for one pass of `windows` [N, T] over all layers.

        Args:
            name: the pass's.
            decoder: the model.
            windows: int64 [N, T].
            depends_on: what else the pass's findings follow from.
            keep_all: keep the inputs of every layer.

        Raises:
            TealError: the disk has no room for them.
        """
        if self.folder is None:
            return MemoryStates(keep_all=keep_all)
        tensors = (windows,) if depends_on is None else (windows, depends_on)
        return DiskStates(
            self.folder / name,
            key=self.key(f"{name} {keep_all}", decoder, *tensors),
            like=decoder.embed(windows[0]),
            count=len(windows),
            steps=decoder.config.num_hidden_layers,
            keep_all=keep_all,
        )

    def key(self, name: str, decoder: Decoder, *tensors: Tensor) -> str:
        """Names a piece of work by all that its findings depend on."""
        what = (
            f"{name} {self.fingerprint} {decoder.config} {decoder.device} {decoder.dtype} "
            f"{torch.__version__} {[tuple(tensor.shape) for tensor in tensors]}"
        )
        digest = hashlib.sha256(what.encode())
        for tensor in tensors:
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()
