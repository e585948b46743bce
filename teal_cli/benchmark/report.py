"""A benchmark's result as a table, and as a JSON, CSV or Markdown file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from teal_cli.benchmark.kernels import KernelResult, KernelRow
from teal_cli.benchmark.result import BenchResult, CardRow, Row
from teal_cli.benchmark.timing import Spread
from teal_cli.benchmark.tune import Tuned, TuneResult

Table = tuple[list[str], list[list[str]]]  # column names, rows


def card_table(card: Sequence[CardRow]) -> Table:
    """What a token reads, and the speed that the bandwidth would allow."""
    columns = ["reads per token", "projections", "lm_head", "KV cache", "total", "ceiling"]
    return columns, [
        [
            f"sparse {row.sparsity:.4g}" if row.sparsity else "dense",
            _size(row.bytes.projections),
            _size(row.bytes.lm_head),
            _size(row.bytes.cache),
            _size(row.bytes.total),
            f"{row.ceiling_tokens_per_s:.1f} tokens/s",
        ]
        for row in card
    ]


def result_table(rows: Sequence[Row]) -> Table:
    """The measured figures, spreads in brackets."""
    references = [row.label for row in rows if row.kind != "sparse"]
    columns = ["", "realised", "tokens/s", "ms/token", "prompt tokens/s", "first token"]
    columns += ["read/token", "of ceiling", *(f"× {label}" for label in references)]
    table = []
    for row in rows:
        line = [
            f"{row.label} ({row.dtype})" if row.kind == "baseline" else row.label,
            "" if row.realised_sparsity is None else f"{row.realised_sparsity:.3f}",
            _spread(row.tokens_per_s, 1),
            _spread(row.time_per_token_ms, 2),
            _spread(row.prompt_tokens_per_s, 1),
            f"{row.time_to_first_token_ms.median:.0f} ms",
            _size(row.bytes_per_token),
            f"{row.bandwidth_share:.0%}",
        ]
        line += [
            _spread(row.speedup[label], 2) if label in row.speedup else "" for label in references
        ]
        table.append(line)
    return columns, table


def short_table(rows: Sequence[Row]) -> Table:
    """The same for a terminal: spreads as shares of the median, and less that can be derived."""
    references = [row.label for row in rows if row.kind != "sparse"]
    columns = ["", "realised", "tokens/s", "prompt tokens/s", "first token", "ceiling"]
    columns += [f"× {label}" for label in references]
    return columns, [
        [
            row.label,
            "" if row.realised_sparsity is None else f"{row.realised_sparsity:.3f}",
            f"{row.tokens_per_s.median:.1f} ±{_half_spread(row.tokens_per_s):.0%}",
            f"{row.prompt_tokens_per_s.median:.1f}",
            f"{row.time_to_first_token_ms.median:.0f} ms",
            f"{row.bandwidth_share:.0%}",
            *(
                f"{row.speedup[label].median:.2f}" if label in row.speedup else ""
                for label in references
            ),
        ]
        for row in rows
    ]


def backends(rows: Sequence[Row]) -> list[str]:
    """A sentence for each baseline: in what, and by what it was measured."""
    return [f"{row.label}: {row.dtype}, {row.backend}" for row in rows if row.kind == "baseline"]


def heading(result: BenchResult, spreads: str = "[p20–p80]") -> str:
    """What was measured where, and how spreads are written, in one line."""
    model, machine, settings = result.model, result.environment, result.settings
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    weights = ", random weights" if model["weights"] == "random" else ""
    return (
        f"{model['name']}{weights}, {_weights_type(model)}, {machine['device_name']}{threads}: "
        f"{settings['tokens']} tokens after a prompt of {settings['prompt_tokens']}, "
        f"median of {settings['repeats']} {spreads}"
    )


def kernel_table(rows: Sequence[KernelRow]) -> Table:
    """What each matrix takes at each sparsity, spreads in brackets."""
    columns = ["", "in → out", "realised", "µs", "GB/s", "of ceiling", "F.linear µs", "× F.linear"]
    return columns, [
        [
            f"{row.kernel} {row.target_sparsity:.4g}" if row.target_sparsity else row.kernel,
            f"{row.inputs} → {row.outputs}",
            f"{row.realised_sparsity:.3f}",
            _spread(row.time_us, 1),
            f"{row.bytes_per_s / 1e9:.0f}",
            f"{row.bandwidth_share:.0%}",
            f"{row.linear_us.median:.1f} ({row.linear_dtype})",
            _spread(row.speedup, 2),
        ]
        for row in rows
    ]


def tune_table(rows: Sequence[Tuned]) -> Table:
    """What was found for each matrix, and what it brings."""
    columns = ["", "µs before", "µs after", "launch"]
    return columns, [
        [
            f"{row.kernel}, from sparsity {row.regime:g}",
            f"{row.before_us:.2f}",
            f"{row.after_us:.2f}",
            ", ".join(f"{name} {value}" for name, value in row.launch.items()),
        ]
        for row in rows
    ]


def kernel_heading(result: KernelResult | TuneResult) -> str:
    """Which kernels were measured where, in one line."""
    model, machine = result.model, result.environment
    return (
        f"{model['name']}, {_weights_type(model)}, {machine['device_name']}: "
        "one matrix of every layer"
    )


def render_kernels(result: KernelResult | TuneResult, suffix: str) -> str:
    """The result as the text of a file with this suffix, one of TABLE_SUFFIXES."""
    document = asdict(result)
    if suffix == ".json":
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    columns, lines = (
        kernel_table(result.rows) if isinstance(result, KernelResult) else tune_table(result.rows)
    )
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([[column or "kernel" for column in columns], *lines])
        return text.getvalue()
    versions = ", ".join(f"{k} {v}" for k, v in result.environment["versions"].items())
    parts = [kernel_heading(result) + ".", _pipe_table((columns, lines)), *result.notes]
    return "\n\n".join([*parts, f"{versions}; {result.environment['date']}"]) + "\n"


def render(result: BenchResult, suffix: str) -> str:
    """The result as the text of a file with this suffix, one of TABLE_SUFFIXES."""
    if suffix == ".json":
        return json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n"
    return _csv(result) if suffix == ".csv" else _markdown(result)


def _csv(result: BenchResult) -> str:
    """One line a row, machine and model repeated on each so that files can be joined."""
    common = {
        "model": result.model["name"],
        "weights": result.model["weights"],
        "quantization": result.model.get("quantization"),
        "device": result.environment["device_name"],
        "threads": result.environment["threads"],
        "torch": result.environment["versions"].get("torch"),
        "teal": result.environment["versions"]["teal"],
        "date": result.environment["date"],
        "tokens": result.settings["tokens"],
        "prompt_tokens": result.settings["prompt_tokens"],
        "repeats": result.settings["repeats"],
        "bandwidth_bytes_per_s": result.bandwidth.bytes_per_s,
    }
    references = [row.label for row in result.rows if row.kind != "sparse"]
    lines = []
    for row in result.rows:
        line = {
            "label": row.label,
            "kind": row.kind,
            "dtype": row.dtype,
            "backend": row.backend,
            "target_sparsity": row.target_sparsity,
            "realised_sparsity": row.realised_sparsity,
            "bytes_per_token": row.bytes_per_token,
            "bandwidth_share": row.bandwidth_share,
        }
        spreads = {
            "tokens_per_s": row.tokens_per_s,
            "time_per_token_ms": row.time_per_token_ms,
            "prompt_tokens_per_s": row.prompt_tokens_per_s,
            "time_to_first_token_ms": row.time_to_first_token_ms,
            **{f"speedup_over_{label}": row.speedup.get(label) for label in references},
        }
        for name, value in spreads.items():
            line[name] = value.median if value else None
            line[f"{name}_p20"] = value.low if value else None
            line[f"{name}_p80"] = value.high if value else None
        lines.append(line | common)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _markdown(result: BenchResult) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in result.environment["versions"].items())
    parts = [
        heading(result) + ".",
        _pipe_table(card_table(result.card)),
        f"Ceiling at the measured {result.bandwidth.bytes_per_s / 1e9:.1f} GB/s "
        f"({result.bandwidth.how}).",
        _pipe_table(result_table(result.rows)),
        *result.notes,
        f"{versions}; {result.environment['date']}",
    ]
    return "\n\n".join(parts) + "\n"


def _pipe_table(table: Table) -> str:
    columns, rows = table
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *rows))


def _weights_type(model: Mapping[str, Any]) -> str:
    kind = model.get("quantization")
    return f"{kind} ({model['dtype']})" if kind else str(model["dtype"])


def _spread(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}–{value.high:.{digits}f}]"


def _half_spread(value: Spread) -> float:
    return (value.high - value.low) / 2 / value.median


def _size(amount: int) -> str:
    """Bytes with three figures, so that two sparsities never look alike."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= power:
            return f"{amount / power:#.3g} {unit}".replace(". ", " ")
    return f"{amount} B"
