"""What guesses for a model on a device."""

from __future__ import annotations

import pytest
import torch
from teal_kernels.quantized import QuantizedRows

from teal_cli.benchmark.bench import Settings
from teal_cli.benchmark.subject import Subject
from teal_cli.drafts import measured, ready
from teal_cli.drafts.names import Wanted
from teal_cli.inference.drafting import Drafting
from teal_cli.inference.session import Session
from teal_cli.model.config import ModelConfig
from teal_cli.model.random_weights import random_decoder
from teal_cli.progress import Silent
from teal_cli.sparsity.setting import DENSE

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 2000,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)


def test_a_guesser_has_an_lm_head_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder(CONFIG, device="cpu", dtype=torch.float32, seed=0)
    guessing = ready.with_quick_head(decoder)
    assert isinstance(guessing.weights.lm_head, QuantizedRows)
    assert guessing.weights.layers is decoder.weights.layers
    assert guessing.weights.embed_tokens is decoder.weights.embed_tokens
    hidden = torch.randn(5, 64)
    near, exact = guessing.logits(hidden), decoder.logits(hidden)
    assert 0 < (near - exact).norm() / exact.norm() < 0.01
    assert ready.with_quick_head(guessing) is guessing
    monkeypatch.setattr(ready, "available_memory", lambda device: 2 * 64 * 2000)
    assert ready.with_quick_head(decoder) is decoder


@pytest.mark.gpu
def test_on_a_gpu_the_model_guesses_with_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    decoder = random_decoder(CONFIG, device="cuda", dtype=torch.float16, seed=0)
    tested = Subject(decoder, {}, [1, 2, 3], lambda session, sparsity: DENSE)
    settings = Settings((0.5,), tokens=20, draft="self", acceptance=0.8)
    subject = measured.on_random(Wanted.parse("self"), tested, settings, Silent())
    assert subject.guessers is not None
    session = Session(decoder, max_length=64)
    (attach,) = subject.guessers.values()
    attach(session)
    assert isinstance(session.drafting, Drafting)
    own = session.drafting.session
    assert own is not None
    assert isinstance(own.decoder.weights.lm_head, QuantizedRows)
    assert isinstance(decoder.weights.lm_head, torch.Tensor)
