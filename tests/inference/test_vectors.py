"""Vectors of recovery in a session: on steps, not on prompts, and swapped with the setting."""

from __future__ import annotations

import pytest
import torch
from inference.test_session import BACKENDS, PROMPT, close, half
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor

from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.sparsity.recovery import FIELDS, own_vectors
from teal_cli.sparsity.setting import Setting


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_act_on_steps_and_not_on_prompts(
    decoder: Decoder, thresholds: Tensor, backend: str
) -> None:
    own = own_vectors(decoder)
    vectors = RecoveryVectors(*(getattr(own, name) + 0.1 for name in FIELDS))
    setting = Setting("uniform", 0.5, thresholds, vectors)
    session = Session(decoder, max_length=40, setting=setting, backend=backend)  # type: ignore[arg-type]
    actual = [session.prefill(PROMPT[:12]), *(session.step(token) for token in PROMPT[12:])]
    with torch.inference_mode():
        hidden = decoder.forward(
            torch.tensor(PROMPT), thresholds=thresholds, vectors=vectors, sparse_from=12
        )
        plain = decoder.forward(torch.tensor(PROMPT), thresholds=thresholds, sparse_from=12)
    expected, without = decoder.logits(hidden)[11:], decoder.logits(plain)[11:]
    assert (expected - without)[1:].abs().mean() > 0.1 * without.std()
    for a, b in zip(actual, expected, strict=True):
        close(a, b)

    # Swapped by the setting, from the next token on.
    session.use(half(thresholds))
    session.rewind(12)
    for token, b in zip(PROMPT[12:], without[1:], strict=True):
        close(session.step(token), b)


def test_a_dense_setting_has_no_vectors(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="no vectors"):
        Setting("dense", 0.0, None, own_vectors(decoder))
