"""One evaluation: the forms of a model that are compared, on a text or on tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teal_cli.environment import environment
from teal_cli.evaluation import comparison, perplexity, protocols
from teal_cli.evaluation.comparison import QualityReport
from teal_cli.evaluation.protocols import ProtocolName
from teal_cli.evaluation.tasks_report import TasksReport
from teal_cli.inference.session import Session
from teal_cli.model.checkpoint import Checkpoint
from teal_cli.model.decoder import Decoder
from teal_cli.progress import Reporter
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.setting import Setting
from teal_cli.text.corpora import Corpus, load_corpus
from teal_cli.text.windows import windows


@dataclass(frozen=True, slots=True)
class Form:
    """One form of the model, quantized or not, and the settings that are measured on it."""

    checkpoint: Checkpoint
    profile: Profile | None  # where nothing is sparse
    settings: tuple[Setting, ...]

    def inputs(self) -> dict[str, Any]:
        """What a report says of a quantized form."""
        checkpoint, profile = self.checkpoint, self.profile
        return {
            "quantization": checkpoint.quantization and checkpoint.quantization.name,
            "fingerprint": checkpoint.fingerprint,
            "rounding": checkpoint.rounding,
            "profile": dict(profile.provenance) if profile else {},
        }


@dataclass(frozen=True, slots=True)
class Run:
    """What is evaluated, and where.

    All is compared with the dense model of `checkpoint`, which may be one of the forms'.
    """

    checkpoint: Checkpoint
    forms: tuple[Form, ...]
    device: torch.device
    offline: bool
    reporter: Reporter

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those of all forms."""
        return tuple(setting for form in self.forms for setting in form.settings)

    def on_text(
        self,
        dataset: str | None,
        column: str | None,
        samples: int,
        protocol: ProtocolName,
        context: int | None,
    ) -> QualityReport:
        """Perplexity and distance from the dense model on text that calibration did not see.

        Args:
            dataset: what `load_corpus` takes.
            column: the data's text column.
            samples: windows to score, spread over the text; 0 is all.
            protocol: how a window is scored.
            context: tokens in a window of the standard protocol.

        Raises:
            TealError: the text cannot be had or is too short, or a loss is not finite.
        """
        plan = protocols.protocol(protocol, self.checkpoint.config, context)
        corpus = self._corpus(dataset, column)
        tokenizer = self.checkpoint.tokenizer()
        text = plan.cut(lambda length: windows(tokenizer, corpus, seq_len=length))
        chosen = protocols.spread(len(text), samples or None)
        dense = self.checkpoint.load(self.device)
        result = perplexity.evaluate(
            dense,
            text[chosen],
            self.settings,
            plan,
            self.reporter,
            decoders=self._decoders(dense),
        )
        read = _of_corpus(corpus, column) | {"windows": len(text), "windows_scored": chosen}
        return comparison.QualityReport.of(
            self._inputs() | {"dataset": read}, self.settings, result
        )

    def on_tasks(
        self,
        specs: Sequence[str],
        protocol: ProtocolName,
        context: int | None,
        limit: int | None,
        num_fewshot: int | None,
        draft: tuple[str, Callable[[Session], None]] | None = None,
        *,
        dataset: str | None = None,
        column: str | None = None,
    ) -> TasksReport:
        """Tasks of lm-eval; a task's own dense run is what its sparse ones are compared with.

        Args:
            specs: names of tasks, those that are made from a text too, or task files.
            protocol: which positions of a text that is scored are sparse.
            context: tokens that a document may have.
            limit: documents of each task.
            num_fewshot: worked examples before each document.
            draft: who guesses the tokens of answers, and what lets it.
            dataset: the text that tasks are made from, as `load_corpus` takes it.
            column: the data's text column.

        Raises:
            TealError: there is no such task, or its data cannot be had.
        """
        from teal_cli.evaluation import harness, tasks, text_tasks

        inputs: dict[str, Any] = {"protocol": protocol, "draft": draft and draft[0]}
        made = {}
        if wanted := [spec for spec in specs if text_tasks.is_made(spec)]:
            corpus = self._corpus(dataset, column)
            made = {name: text_tasks.make(name, corpus) for name in wanted}
            inputs["dataset"] = _of_corpus(corpus, column)
        room = protocols.task_context(self.checkpoint.config, context)
        subject = harness.Subject(
            self.checkpoint.load(self.device),
            self.checkpoint.tokenizer(),
            self.checkpoint.eos_token_ids,
            protocol,
            room,
            draft and draft[1],
        )
        return tasks.run(
            subject,
            specs,
            self.settings,
            self._inputs() | inputs | {"context": room},
            made=made,
            limit=limit,
            num_fewshot=num_fewshot,
            offline=self.offline,
            reporter=self.reporter,
        )

    def _corpus(self, dataset: str | None, column: str | None) -> Corpus:
        return load_corpus(
            dataset,
            split_role="evaluation",
            column=column,
            offline=self.offline,
            calibrated_on=self._learnt_from(),
            reporter=self.reporter,
        )

    def _learnt_from(self) -> set[str]:
        """Fingerprints of the texts that profiles and rounding have seen."""
        profiles = [form.profile for form in self.forms if form.profile]
        seen = [profile.provenance for profile in profiles]
        seen += [found.provenance for profile in profiles for found in profile.recovery.values()]
        seen += [form.checkpoint.rounding for form in self.forms]
        return {
            str(entry["dataset_fingerprint"]) for entry in seen if "dataset_fingerprint" in entry
        }

    def _decoders(self, dense: Decoder) -> dict[str, Decoder]:
        """The model that each setting is measured on, by label."""
        found: dict[str, Decoder] = {}
        for form in self.forms:
            own = form.checkpoint is self.checkpoint
            decoder = dense if own else form.checkpoint.load(self.device)
            found |= {setting.label: decoder for setting in form.settings}
        return found

    def _inputs(self) -> dict[str, Any]:
        """What a report needs to say for the run to be repeated."""
        profile = self.forms[0].profile
        return {
            "model": {
                "name": self.checkpoint.name,
                "revision": self.checkpoint.revision,
                "fingerprint": self.checkpoint.fingerprint,
                "dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            },
            "profile": {
                "methods": list(dict.fromkeys(setting.method for setting in self.settings)),
                "provenance": dict(profile.provenance) if profile else {},
            },
            "quantized": [
                form.inputs() for form in self.forms if form.checkpoint.quantization is not None
            ],
            "environment": environment(self.device),
        }


def _of_corpus(corpus: Corpus, column: str | None) -> dict[str, Any]:
    """What a report says of its text."""
    return {
        "name": corpus.name,
        "part": corpus.part,
        "column": column,
        "fingerprint": corpus.fingerprint,
    }
