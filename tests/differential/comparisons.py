"""What teal makes of a model against its oracle: transformers on the same folder.

Every oracle is computed here and now; nothing that it said is written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from differential.situations import Made
from differential.vocabularies import TEXTS

from teal_cli import pipeline
from teal_cli.errors import TealError
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.progress import Silent
from teal_cli.store import models, paths

Chat = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr

_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
}


def checkpoint_of(made: Made, dtype: str | None = "float32") -> Checkpoint:
    """The user's road: what the model's path names, fetched and converted."""
    return pipeline.ensure_checkpoint(
        models.resolve(str(made.given)), dtype=dtype, reporter=Silent()
    )


def oracle(made: Made) -> Any:
    """What transformers makes of the folder, in float32."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]  # it would have made weights up
    return model.eval()


def their_tokenizer(made: Made) -> Any:
    """The folder's tokenizer.json as it stands; transformers adds template and flags."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(made.folder)


@dataclass(frozen=True, slots=True)
class Tensors:
    """Every converted tensor equals the one of the same meaning in transformers' state_dict.

    Where a packer wrote the checkpoint, what it put in is the oracle, up to float16's rounding.
    """

    rtol: float = 0.0

    def __call__(self, made: Made, chat: Chat) -> None:
        weights = checkpoint_of(made).load().weights
        state = made.tensors or oracle(made).state_dict()
        found = {**dict(weights.named_tensors()), "lm_head": weights.lm_head}
        compared = set()
        for name, tensor in found.items():
            sources = _sources(name)
            if sources[0] not in state:  # a family that has them fused
                *layer, kind = sources[0].split(".")[:-2]
                fused = {"self_attn": "qkv_proj", "mlp": "gate_up_proj"}[kind]
                sources = [".".join((*layer, kind, fused, "weight"))]
            whole = torch.cat([state[source] for source in sources])
            expected = whole.T if whole.ndim == 2 and name.startswith("layers") else whole
            torch.testing.assert_close(
                tensor, expected, rtol=self.rtol, atol=self.rtol / 100, msg=f"{name} differs"
            )
            compared |= set(sources)
        assert compared == set(state)


def _sources(name: str) -> list[str]:
    *layer, kind = name.split(".")
    if not layer:
        return [{"lm_head": "lm_head.weight"}.get(kind, f"model.{kind}.weight")]
    suffix = "bias" if kind.endswith("_bias") else "weight"
    parts = _PARTS[kind.removesuffix("_bias")]
    return [f"model.{'.'.join(layer)}.{part}.{suffix}" for part in parts]


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits after a prompt, and after each token decoded behind it, are transformers'.

    `backend` "auto" decodes by the fused step, "reference" by the plain decoder.
    """

    prompt: int = 24
    steps: int = 8
    backend: Any = "reference"

    def __call__(self, made: Made, chat: Chat) -> None:
        generator = torch.Generator().manual_seed(1)
        size = made.model.config.vocab_size
        length = self.prompt + self.steps
        ids = torch.randint(3, size, (length,), generator=generator)
        with torch.no_grad():
            expected = oracle(made)(ids[None]).logits[0]
        decoder = checkpoint_of(made).load()
        session = Session(decoder, max_length=length, backend=self.backend)
        rows = [session.prefill(ids[: self.prompt])]
        rows += [session.step(int(token)) for token in ids[self.prompt :]]
        torch.testing.assert_close(
            torch.stack(rows), expected[self.prompt - 1 :], atol=5e-5, rtol=1e-4
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts become the tokens that tokenizer.json says, with and without those around a text.

    Where the folder has no tokenizer.json, transformers builds the oracle from what is there.
    """

    texts: tuple[str, ...] = TEXTS

    def __call__(self, made: Made, chat: Chat) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        ours = checkpoint_of(made).tokenizer()
        path = made.folder / "tokenizer.json"
        raw = (
            Tokenizer.from_file(str(path))
            if path.is_file()
            else AutoTokenizer.from_pretrained(made.folder)._tokenizer
        )
        for text in self.texts:
            for special in (False, True):
                expected = raw.encode(text, add_special_tokens=special)
                ids = ours.encode(text, add_special_tokens=special)
                assert ids == expected.ids, (ours.convert_ids_to_tokens(ids), expected.tokens)
            decoded = raw.decode(expected.ids, skip_special_tokens=False)
            assert ours.decode(ids, clean_up_tokenization_spaces=False) == decoded


@dataclass(frozen=True, slots=True)
class Refused:
    """The model is refused before anything is converted, in words that name what it is."""

    error: type[TealError]
    words: tuple[str, ...]

    def __call__(self, made: Made, chat: Chat) -> None:
        with pytest.raises(self.error) as caught:
            checkpoint_of(made, dtype=None).tokenizer()
        said = f"{caught.value.message} {caught.value.hint}".lower()
        assert any(word.lower() in said for word in self.words), said
        assert not list(paths.data_dir().rglob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class EqualOrRefused:
    """What teal need not follow, but may not get wrong."""

    same: Callable[[Made, Chat], None]
    words: tuple[str, ...]

    def __call__(self, made: Made, chat: Chat) -> None:
        try:
            checkpoint_of(made)
        except TealError:
            Refused(TealError, self.words)(made, chat)
        else:
            self.same(made, chat)
