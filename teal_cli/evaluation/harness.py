"""Our decoder as a model of lm-eval, EleutherAI's harness for language-model tasks.

What is sparse: a text that is scored goes through the decoder at once, its context included, and
the protocol says which positions are sparse, as for perplexity. An answer that is generated comes
from a session, as in `teal chat`: the prompt is dense, every token that is decoded is sparse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from teal_cli.errors import TealError
from teal_cli.evaluation.perplexity import LOGITS_CHUNK, check_finite
from teal_cli.evaluation.protocols import ProtocolName, sparse_from
from teal_cli.inference.generate import Finish, Token, generate
from teal_cli.inference.guesses import DraftCounts
from teal_cli.inference.sampling import Sampler, Sampling
from teal_cli.inference.session import Session
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.setting import DENSE, Setting
from teal_cli.sparsity.skips import SkipCount

_SAMPLING_SEED = 1234  # lm-eval's default seed

Scored = tuple[float, bool]  # log-likelihood in nats, whether greedy decoding would say the same


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that the tasks are put to, in all its settings."""

    decoder: Decoder
    tokenizer: Any  # a transformers tokenizer
    eos_token_ids: tuple[int, ...]
    protocol: ProtocolName
    context: int  # tokens that the model sees at most
    guess: Callable[[Session], None] | None = None  # lets something guess a dense answer's tokens


class TealLM(TemplateLM):
    """One setting of a model, ready for `lm_eval.evaluate`."""

    def __init__(self, subject: Subject, setting: Setting, reporter: Reporter) -> None:
        """Put a setting on a model."""
        super().__init__()
        self._subject = subject
        self._decoder = subject.decoder
        self.tokenizer = subject.tokenizer
        self._setting = setting
        self._reporter = reporter
        self._count = SkipCount(subject.decoder, setting.thresholds)
        self.guesses = DraftCounts()
        self._decoded: list[tuple[int, float]] = []  # sparse steps of an answer, share skipped

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._subject.eos_token_ids:
            return self._subject.eos_token_ids[0]
        found = self.tokenizer.eos_token_id
        if found is None:
            raise TealError("this model names no token that ends a text, which lm-eval needs")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS for want of one."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; with the tokenizer's own special tokens unless told otherwise."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def realised_sparsity(self) -> float:
        """Share of the projections' weights skipped so far, over every position but dense ones."""
        scored = self._count.skips()
        total = scored.realised_sparsity * scored.positions
        total += sum(steps * share for steps, share in self._decoded)
        positions = scored.positions + sum(steps for steps, _ in self._decoded)
        return total / positions if positions else 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Scored]:
        """How likely each continuation is after its context."""
        found: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[Scored]:
        context = self._subject.context
        # Choices of one token follow the same input, which is then computed once.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_text, before, continuation) in enumerate(requests):
            if len(continuation) > context:
                raise TealError(
                    f"a task asks for the likelihood of {len(continuation)} tokens at once, "
                    f"beyond the context of {context}"
                )
            seen = (before + continuation)[-(context + 1) : -1]
            groups.setdefault(tuple(seen), []).append(index)
        scores: list[Scored] = [(0.0, True)] * len(requests)
        with self._reporter.task(f"{self._setting.label}: texts", len(requests), "texts") as task:
            for seen_ids, indices in groups.items():
                first = sparse_from(self._subject.protocol, len(seen_ids))
                hidden = self._decoder.forward(
                    torch.tensor(seen_ids, dtype=torch.int64),
                    thresholds=self._setting.thresholds,
                    vectors=self._setting.vectors,
                    sparse_from=first,
                    observe=self._count.observer(first),
                )
                for index in indices:
                    scores[index] = self._score(hidden, requests[index][2])
                task.advance(len(indices))
        return scores

    def _score(self, hidden: Tensor, continuation: Sequence[int]) -> Scored:
        """Log-likelihood of the tokens that the last hidden states predict."""
        hidden = hidden[len(hidden) - len(continuation) :]
        targets = torch.tensor(continuation, dtype=torch.int64, device=hidden.device)[:, None]
        rows = max(1, LOGITS_CHUNK // self._decoder.config.vocab_size)
        total, greedy = 0.0, True
        for start in range(0, len(continuation), rows):
            wanted = targets[start : start + rows]
            logits = torch.log_softmax(self._decoder.logits(hidden[start : start + rows]), dim=-1)
            total += float(logits.gather(-1, wanted).double().sum())
            greedy = greedy and bool((logits.argmax(-1) == wanted[:, 0]).all())
        check_finite(total, self._setting)
        return total, greedy

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """How likely each whole text is, read in windows of the context's length."""
        parts: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._subject.context,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            parts += [(None, before, wanted) for before, wanted in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(parts))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Answers, each cut off before the first of its stop strings."""
        asked = [self._prepare(*request.args) for request in requests]
        room = max((len(prompt) + limit for prompt, limit, _, _ in asked), default=1)
        session = Session(
            self._decoder,
            max_length=room,
            setting=self._setting,
            reporter=self._reporter,
        )
        if self._subject.guess is not None and self._setting is DENSE:
            self._subject.guess(session)
        answers = []
        with self._reporter.task(f"{self._setting.label}: answers", len(asked), "answers") as task:
            for prompt, limit, stops, sampling in asked:
                answers.append(self._answer(session, prompt, limit, stops, sampling))
                # The next prompt may share this one's dense part, but not what was decoded.
                session.rewind(min(len(prompt), session.position))
                task.advance()
        return answers

    def _prepare(
        self, text: str, arguments: dict[str, Any]
    ) -> tuple[list[int], int, list[str], Sampling]:
        """A request's prompt, most new tokens, stop strings and sampling."""
        given: Any = normalize_gen_kwargs(arguments)
        limit = given["max_gen_toks"]
        room = self._subject.context - limit
        if room < 1:
            raise TealError(
                f"a task asks for answers of {limit} tokens, "
                f"which leaves no room in the context of {self._subject.context}"
            )
        sampling = Sampling(
            temperature=float(given.get("temperature") or 1.0) if given["do_sample"] else 0.0,
            top_k=int(given.get("top_k") or 0),
            top_p=float(given.get("top_p") or 1.0),
            min_p=float(given.get("min_p") or 0.0),
            repetition_penalty=float(given.get("repetition_penalty") or 1.0),
            seed=_SAMPLING_SEED,
        )
        stops = [stop for stop in given["until"] if stop]
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        return prompt[-room:], limit, stops, sampling

    def _answer(
        self, session: Session, prompt: list[int], limit: int, stops: list[str], sampling: Sampling
    ) -> str:
        tokens: list[int] = []
        text = ""
        steps = generate(
            session,
            prompt,
            Sampler(sampling),
            max_new_tokens=limit,
            stop_token_ids={self.eot_token_id, *self._subject.eos_token_ids},
            interrupted=lambda: any(stop in text for stop in stops),
        )
        for step in steps:
            if isinstance(step, Token):
                tokens.append(step.id)
                text = self.tokenizer.decode(tokens)
            elif isinstance(step, Finish) and step.stats.draft is not None:
                self.guesses += step.stats.draft
            elif isinstance(step, Finish) and step.stats.realised_sparsity is not None:
                # The last token is decoded only to find that the answer stops after it.
                decoded = len(tokens) - (step.reason != "stop")
                self._decoded.append((decoded, step.stats.realised_sparsity))
        answer: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [answer.find(stop) for stop in stops if stop in answer]
        return answer[: min(ends)] if ends else answer
