"""Thresholds for a model without training: from its own activations, until they are met."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS
from teal_cli.progress import Reporter
from teal_cli.sparsity.calibrate import calibrate
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import Setting

_WINDOW = 128  # positions, each with thousands of channels: quantiles to three digits
_ROUNDS, _STEPS = 4, 24
_TOLERANCE = 0.003


def self_calibrated(decoder: Decoder, *, seed: int, reporter: Reporter) -> Profile:
    """A profile from what a prompt of random tokens makes the model do."""
    generator = torch.Generator().manual_seed(seed)
    size = (1, min(_WINDOW, decoder.config.context_length))
    tokens = torch.randint(decoder.config.vocab_size, size, generator=generator)
    return calibrate(decoder, tokens, model="random weights", reporter=reporter)


def met_setting(
    session: Session, profile: Profile, sparsity: float, prompt: Sequence[int]
) -> Setting:
    """Thresholds that give every projection a sparsity on the tokens that are decoded.

    Sparse activations differ from the dense ones of the profile, and random weights attend to
    everything alike, so that the attention's output shrinks with the position. What decoding
    realises corrects what is asked of the profile, projection by projection.

    Args:
        session: decodes; it is reset before and after.
        profile: of the same model.
        sparsity: target in [0, 1).
        prompt: tokens to decode after.
    """
    shape = (session.decoder.config.num_hidden_layers, len(PROJECTIONS))
    asked = torch.full(shape, sparsity, dtype=torch.float64)
    setting = Setting("uniform", sparsity, profile.quantiles.thresholds(asked))
    for _ in range(_ROUNDS if sparsity > 0 else 0):
        realised = _realised(session, setting, prompt)
        if abs(profile.model_sparsity(realised) - sparsity) < _TOLERANCE:
            break
        asked = (asked + sparsity - realised).clamp(min=0)
        setting = Setting("uniform", sparsity, profile.quantiles.thresholds(asked))
    session.reset()
    return setting


def _realised(session: Session, setting: Setting, prompt: Sequence[int]) -> Tensor:
    """The share of channels that each projection skips while decoding, [L, 7] float64."""
    session.reset()
    session.use(setting)
    logits = session.prefill(prompt)
    for _ in range(min(_STEPS, session.max_length - len(prompt))):
        logits = session.step(int(logits.argmax()))
    skips = session.skips()
    assert skips is not None
    return skips.shares
