"""The text that calibration and rounding read: which windows, and what is recorded of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from teal_cli.progress import Reporter

if TYPE_CHECKING:
    from torch import Tensor

    from teal_cli.text.corpora import Corpus


@dataclasses.dataclass(frozen=True, slots=True)
class SampleSettings:
    """`samples` windows of `seq_len` tokens; `dataset` None is the usual text.

    On the demo model, three times as many windows move the model's sparsity at a target by
    0.0002, and that of a single projection by at most 0.017 (mean 0.002).
    """

    dataset: str | None = None
    column: str | None = None
    samples: int = 16
    seq_len: int = 512
    seed: int = 0

    def read(
        self, tokenizer: Any, context_length: int, *, offline: bool, reporter: Reporter
    ) -> tuple[Corpus, Tensor]:
        """The text, and its windows [samples, seq_len] int64, of at most the model's context."""
        from teal_cli.text.corpora import load_corpus
        from teal_cli.text.windows import windows

        corpus = load_corpus(
            self.dataset,
            split_role="calibration",
            column=self.column,
            offline=offline,
            reporter=reporter,
        )
        tokens = windows(
            tokenizer,
            corpus,
            seq_len=min(self.seq_len, context_length),
            samples=self.samples,
            seed=self.seed,
        )
        return corpus, tokens

    def provenance(self, corpus: Corpus) -> dict[str, Any]:
        """What a profile, or a rounding, keeps of its text."""
        return {
            "dataset": corpus.name,
            "dataset_part": corpus.part,
            "dataset_fingerprint": corpus.fingerprint,
            "seed": self.seed,
            "settings": dataclasses.asdict(self),
        }
