"""What teal makes of a model against its oracle: transformers on the same folder.

Every oracle is computed here and now; nothing that it said is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from differential.situations import Made
from differential.vocabularies import TEXTS

from teal_cli import pipeline
from teal_cli.errors import TealError
from teal_cli.inference.conversation import Conversation
from teal_cli.inference.defaults import chat_defaults, sampling_defaults, stop_token_ids
from teal_cli.inference.detokenizer import Detokenizer, printable
from teal_cli.inference.generate import Finish
from teal_cli.inference.sampling import Sampler, Sampling, candidates
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
                assert ours.convert_ids_to_tokens(ids) == expected.tokens
                assert ids == expected.ids
            decoded = raw.decode(expected.ids, skip_special_tokens=False)
            assert ours.decode(ids, clean_up_tokenization_spaces=False) == decoded


@dataclass(frozen=True, slots=True)
class Stream:
    """The pieces that are shown one by one make the text that the whole decodes to."""

    texts: tuple[str, ...] = ()
    random: int = 0  # so many sequences of random tokens

    def __call__(self, made: Made, chat: Chat) -> None:
        ours, theirs = checkpoint_of(made).tokenizer(), their_tokenizer(made)
        context = theirs.encode("A:", add_special_tokens=False)
        generator = torch.Generator().manual_seed(2)
        answers = [theirs.encode(text, add_special_tokens=False) for text in self.texts]
        answers += [
            torch.randint(0, len(theirs), (40,), generator=generator).tolist()
            for _ in range(self.random)
        ]
        for answer in answers:
            stream = Detokenizer(ours, context)
            shown = "".join([*map(stream.add, answer), stream.finish()])
            before, whole = (
                theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for ids in (context, context + answer)
            )
            # Bytes at the end that are no character yet are not shown.
            expected = printable(whole.removeprefix(before)).rstrip("\ufffd")
            assert shown.rstrip("\ufffd") == expected


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads is what apply_chat_template makes of the conversation.

    `parts` gives the template each content as a list with one text part.
    """

    turns: tuple[str, ...] = ("Hi there", "And you?")
    system: str | None = None
    parts: bool = False

    def __call__(self, made: Made, chat: Chat) -> None:
        checkpoint = checkpoint_of(made)
        session = Session(checkpoint.load(), max_length=500, backend="reference")
        tokenizer, theirs = checkpoint.tokenizer(), their_tokenizer(made)
        conversation = Conversation(
            session,
            tokenizer,
            Sampler(Sampling()),
            stop_token_ids=stop_token_ids(checkpoint.eos_token_ids, tokenizer),
            system=self.system,
        )
        for turn in self.turns:
            *_, finish = conversation.answer(turn, max_new_tokens=4)
            assert isinstance(finish, Finish)
            messages: list[dict[str, Any]] = conversation.messages[:-1]
            assert messages[-1]["content"] == turn
            if self.parts:
                messages = [
                    {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
                ]
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            read = session.tokens[: finish.stats.prompt_tokens]
            assert read == theirs.encode(text, add_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """`teal chat -s 0` says what transformers.generate says, greedily, with the folder's settings.

    `ends` are the tokens that end an answer where the folder's files don't name them all: those
    that llama.cpp knows by name. `options` are added to the command.
    """

    prompt: str = "Hi"
    ends: tuple[str, ...] = ()
    options: tuple[str, ...] = ("-t", "0")
    max_new_tokens: int = 9

    def __call__(self, made: Made, chat: Chat) -> None:
        expected = self.expected(made)
        assert expected.strip()
        most = str(self.max_new_tokens)
        code, out, said = chat(
            made.given,
            "-s",
            "0",
            "-n",
            most,
            "-p",
            self.prompt,
            "--dtype",
            "float32",
            *self.options,
        )
        assert (code, out.strip()) == (0, expected.strip()), said

    def expected(self, made: Made) -> str:
        """transformers' answer, from the folder."""
        tokenizer = their_tokenizer(made)
        turn = [{"role": "user", "content": self.prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        ends = {"eos_token_id": tokenizer.convert_tokens_to_ids([*self.ends])} if self.ends else {}
        out = oracle(made).generate(
            ids, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=0, **ends
        )
        said = out[0, ids.shape[1] :].tolist()
        if self.ends and said[-1] in ends["eos_token_id"]:
            said.pop()  # perhaps not flagged special, and then decoding shows it
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return printable(text)


@dataclass(frozen=True, slots=True)
class Chances:
    """The next token's probabilities are those that generate would draw from.

    Both sides take their settings from the folder's generation_config.json; `meaning` puts what
    others write into transformers' own words.
    """

    meaning: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, made: Made, chat: Chat) -> None:
        ids = torch.arange(40, 60)
        out = oracle(made).generate(
            ids[None],
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            **self.meaning,
        )
        expected = out.scores[0][0].softmax(-1)
        checkpoint = checkpoint_of(made)
        logits = Session(checkpoint.load(), max_length=40, backend="reference").prefill(ids)
        settings = sampling_defaults(
            checkpoint.generation_defaults(), chat_defaults(checkpoint.config)
        )
        found, tokens = candidates(logits, Sampling(**settings))
        actual = torch.zeros_like(expected).index_add_(0, tokens, found)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)
        assert ((actual > 0) == (expected > 0)).all()


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


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """`teal chat` gives a sentence instead of an answer to what the model can't be asked."""

    words: tuple[str, ...]
    options: tuple[str, ...] = ()

    def __call__(self, made: Made, chat: Chat) -> None:
        code, out, said = chat(
            made.given, "-s", "0", "-t", "0", "-n", "4", "-p", "HELLO", *self.options
        )
        assert code in (1, 2, 3, 5), said
        assert out == ""
        assert "internal error" not in said
        assert any(word in said.lower() for word in self.words), said
