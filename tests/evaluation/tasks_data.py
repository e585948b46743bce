"""Local task files of lm-eval, one for each kind of request, with their documents."""

from __future__ import annotations

import json
from pathlib import Path

_COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
"""
_KINDS = {
    "choice": (
        "multiple_choice",
        """\
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    ),
    "rolling": (
        "loglikelihood_rolling",
        """\
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
""",
    ),
    "answer": (
        "generate_until",
        """\
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    ),
}
DOCUMENTS = tuple(
    {
        "question": f"Number {n} and {n + 1} make",
        "choices": [f" {2 * n + 1}", f" {n}", " nothing at all"],
        "gold": n % 3,
        "answer": str(2 * n + 1),
    }
    for n in range(6)
)


def write_task(folder: Path, kind: str) -> Path:
    """A task file of one of _KINDS."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    output_type, rest = _KINDS[kind]
    path = folder / f"tiny_{kind}.yaml"
    path.write_text(_COMMON.format(name=f"tiny_{kind}", data=data, kind=output_type) + rest)
    return path


def write_group(folder: Path) -> Path:
    """A group of two tasks of choices, its accuracy weighted by their documents."""
    import yaml

    task = yaml.safe_load(write_task(folder, "choice").read_text())
    group = {
        "group": "tiny_group",
        "task": [task | {"task": f"tiny_{name}"} for name in ("one", "two")],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    path = folder / "tiny_group.yaml"
    path.write_text(yaml.safe_dump(group))
    return path
