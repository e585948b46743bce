"""A benchmark's result: its tables at a terminal and in a file, and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from teal_cli.benchmark.kernels import KernelResult, KernelRow
from teal_cli.benchmark.result import REFERENCES, BenchResult, CardRow, Row
from teal_cli.benchmark.timing import Spread
from teal_cli.benchmark.tune import Tuned, TuneResult
from teal_cli.report.result import versions
from teal_cli.report.table import Table


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What decoding was measured to take."""

    result: BenchResult

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self.result)

    def header(self) -> dict[str, Any]:
        """Model, machine and settings."""
        result = self.result
        model, machine, settings = result.model, result.environment, result.settings
        return {
            "model": model["name"],
            "weights": model["weights"],
            "quantization": model.get("quantization"),
            "device": machine["device_name"],
            "threads": machine["threads"],
            "torch": machine["versions"].get("torch"),
            "teal": machine["versions"]["teal"],
            "date": machine["date"],
            "tokens": settings["tokens"],
            "prompt_tokens": settings["prompt_tokens"],
            "repeats": settings["repeats"],
            "bandwidth_bytes_per_s": result.bandwidth.bytes_per_s,
        }

    def records(self) -> list[dict[str, Any]]:
        """One flat record a row, a spread as its median and both percentiles."""
        references = _references(self.result.rows)
        records = []
        for row in self.result.rows:
            record: dict[str, Any] = {
                "label": row.label,
                "kind": row.kind,
                "dtype": row.dtype,
                "backend": row.backend,
                "target_sparsity": row.target_sparsity,
                "realised_sparsity": row.realised_sparsity,
                "bytes_per_token": row.bytes_per_token,
                "bandwidth_share": row.bandwidth_share,
                "acceptance": row.acceptance,
                "tokens_per_round": row.tokens_per_round,
            }
            spreads = {
                "tokens_per_s": row.tokens_per_s,
                "time_per_token_ms": row.time_per_token_ms,
                "prompt_tokens_per_s": row.prompt_tokens_per_s,
                "time_to_first_token_ms": row.time_to_first_token_ms,
                **{f"speedup_over_{label}": row.speedup.get(label) for label in references},
            }
            for name, value in spreads.items():
                record[name] = value.median if value else None
                record[f"{name}_p20"] = value.low if value else None
                record[f"{name}_p80"] = value.high if value else None
            records.append(record)
        return records

    def shown(self) -> Iterator[Table | str]:
        """The card and the short table, then a sentence for each baseline and note."""
        rows, bandwidth = self.result.rows, self.result.bandwidth
        memory = f"Memory: {bandwidth.bytes_per_s / 1e9:.1f} GB/s ({bandwidth.how})"
        yield card_table(self.result.card, title=[memory])
        model, _, how = heading(self.result, "± half of p20–p80").partition(": ")
        yield short_table(rows, title=[f"{model}:", how])
        for row in rows:
            if row.kind == "baseline":
                yield f"{row.label}: {row.dtype}, {row.backend}"
        yield from self.result.notes

    def written(self) -> Iterator[Table | str]:
        """The card and the whole table, what lies between them, and the machine."""
        bandwidth = self.result.bandwidth
        yield card_table(self.result.card, title=[heading(self.result)])
        yield f"Ceiling at the measured {bandwidth.bytes_per_s / 1e9:.1f} GB/s ({bandwidth.how})."
        yield result_table(self.result.rows)
        yield from self.result.notes
        yield _footer(self.result)


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What the matrices one by one were measured to take, or what tuning them found."""

    result: KernelResult | TuneResult

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self.result)

    def header(self) -> dict[str, Any]:
        """Nothing: the table stands alone."""
        return {}

    def records(self) -> list[dict[str, Any]]:
        """The table's rows, as text."""
        table = self._table()
        names = [name or "kernel" for name in table.columns]
        return [dict(zip(names, row, strict=True)) for row in table.rows]

    def shown(self) -> Iterator[Table | str]:
        """The table, and what is to be said of it."""
        yield self._table()
        yield from self.result.notes

    def written(self) -> Iterator[Table | str]:
        """The same, and the machine."""
        yield from self.shown()
        yield _footer(self.result)

    def _table(self) -> Table:
        model, machine = self.result.model, self.result.environment
        title = (
            f"{model['name']}, {_weights_type(model)}, {machine['device_name']}: "
            "one matrix of every layer"
        )
        if isinstance(self.result, TuneResult):
            return tune_table(self.result.rows, title=[title])
        return kernel_table(self.result.rows, title=[title])


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


def card_table(card: Sequence[CardRow], *, title: Sequence[str] = ()) -> Table:
    """What a token reads, and the speed that the bandwidth would allow."""
    columns: list[tuple[str, Callable[[CardRow], str]]] = [
        ("reads per token", lambda row: f"sparse {row.sparsity:.4g}" if row.sparsity else "dense"),
        ("projections", lambda row: _size(row.bytes.projections)),
        ("lm_head", lambda row: _size(row.bytes.lm_head)),
        ("KV cache", lambda row: _size(row.bytes.cache)),
        ("total", lambda row: _size(row.bytes.total)),
        ("ceiling", lambda row: f"{row.ceiling_tokens_per_s:.1f} tokens/s"),
    ]
    return Table.of(card, columns, title=title, figures=True)


def result_table(rows: Sequence[Row], *, title: Sequence[str] = ()) -> Table:
    """The measured figures, spreads in brackets."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: f"{row.label} ({row.dtype})" if row.kind == "baseline" else row.label),
        ("realised", _realised),
        ("tokens/s", lambda row: _spread(row.tokens_per_s, 1)),
        ("ms/token", lambda row: _spread(row.time_per_token_ms, 2)),
        ("prompt tokens/s", lambda row: _spread(row.prompt_tokens_per_s, 1)),
        ("first token", lambda row: f"{row.time_to_first_token_ms.median:.0f} ms"),
        ("read/token", lambda row: _size(row.bytes_per_token)),
        ("of ceiling", lambda row: f"{row.bandwidth_share:.0%}"),
        *_guesses(rows),
    ]
    columns += [
        (f"× {label}", partial(_speedup, label, lambda value: _spread(value, 2)))
        for label in _references(rows)
    ]
    return Table.of(rows, columns, title=title, figures=True)


def short_table(rows: Sequence[Row], *, title: Sequence[str] = ()) -> Table:
    """The same for a terminal: spreads as shares of the median, and less that can be derived."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: row.label),
        ("realised", _realised),
        ("tokens/s", lambda row: _with_half_spread(row.tokens_per_s)),
        ("prompt tokens/s", lambda row: f"{row.prompt_tokens_per_s.median:.1f}"),
        ("first token", lambda row: f"{row.time_to_first_token_ms.median:.0f} ms"),
        ("ceiling", lambda row: f"{row.bandwidth_share:.0%}"),
        *_guesses(rows),
    ]
    columns += [
        (f"× {label}", partial(_speedup, label, lambda value: f"{value.median:.2f}"))
        for label in _references(rows)
    ]
    return Table.of(rows, columns, title=title)


def kernel_table(rows: Sequence[KernelRow], *, title: Sequence[str] = ()) -> Table:
    """What each matrix takes at each sparsity, spreads in brackets."""
    columns: list[tuple[str, Callable[[KernelRow], str]]] = [
        ("", _kernel),
        ("in → out", lambda row: f"{row.inputs} → {row.outputs}"),
        ("realised", lambda row: f"{row.realised_sparsity:.3f}"),
        ("µs", lambda row: _spread(row.time_us, 1)),
        ("GB/s", lambda row: f"{row.bytes_per_s / 1e9:.0f}"),
        ("of ceiling", lambda row: f"{row.bandwidth_share:.0%}"),
        ("F.linear µs", lambda row: f"{row.linear_us.median:.1f} ({row.linear_dtype})"),
        ("× F.linear", lambda row: _spread(row.speedup, 2)),
    ]
    return Table.of(rows, columns, title=title, figures=True)


def tune_table(rows: Sequence[Tuned], *, title: Sequence[str] = ()) -> Table:
    """What was found for each matrix, and what it brings."""
    columns: list[tuple[str, Callable[[Tuned], str]]] = [
        ("", lambda row: f"{row.kernel}, from sparsity {row.regime:g}"),
        ("µs before", lambda row: f"{row.before_us:.2f}"),
        ("µs after", lambda row: f"{row.after_us:.2f}"),
        ("launch", lambda row: ", ".join(f"{name} {value}" for name, value in row.launch.items())),
    ]
    return Table.of(rows, columns, title=title, figures=True)


def _guesses(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """What guesses brought, where there are any."""
    if not any(row.kind == "draft" for row in rows):
        return []
    return [
        ("right", lambda row: "" if row.acceptance is None else f"{row.acceptance:.0%}"),
        (
            "a round",
            lambda row: "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
        ),
    ]


def _references(rows: Sequence[Row]) -> list[str]:
    """What speed-ups are over."""
    return [row.label for row in rows if row.kind in REFERENCES]


def _footer(result: BenchResult | KernelResult | TuneResult) -> str:
    return f"{versions(result.environment)}; {result.environment['date']}"


def _weights_type(model: Mapping[str, Any]) -> str:
    kind = model.get("quantization")
    return f"{kind} ({model['dtype']})" if kind else str(model["dtype"])


def _realised(row: Row) -> str:
    return "" if row.realised_sparsity is None else f"{row.realised_sparsity:.3f}"


def _kernel(row: KernelRow) -> str:
    return f"{row.kernel} {row.target_sparsity:.4g}" if row.target_sparsity else row.kernel


def _speedup(label: str, text: Callable[[Spread], str], row: Row) -> str:
    return text(row.speedup[label]) if label in row.speedup else ""


def _spread(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} [{value.low:.{digits}f}–{value.high:.{digits}f}]"


def _with_half_spread(value: Spread) -> str:
    return f"{value.median:.1f} ±{(value.high - value.low) / 2 / value.median:.0%}"


def _size(amount: int) -> str:
    """Bytes with three figures, so that two sparsities never look alike."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= power:
            return f"{amount / power:#.3g} {unit}".replace(". ", " ")
    return f"{amount} B"
