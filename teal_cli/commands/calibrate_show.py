"""`teal calibrate --show`: what a model's stored profile holds, at a terminal and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_cli import console
from teal_cli.errors import UsageError


@dataclass(frozen=True, slots=True)
class Look:
    """What --show is to show; None is the default."""

    sparsity: tuple[float, ...] | None
    layer: int | None
    site: str | None
    plot: Path | None


def check_show(others: dict[str, Any], look: Look) -> None:
    """Refuse options that calibrate, and a site without its layer."""
    for name, value in others.items():
        if value is not None:
            raise UsageError(
                f"--show looks at the profile that is there: leave out --{name.replace('_', '-')}"
            )
    if look.sparsity is not None and len(look.sparsity) > 1:
        raise UsageError("--show looks at one --sparsity at a time")
    if look.site is not None and look.layer is None:
        raise UsageError("--site goes with --layer")


def show_profile(
    model: str | None,
    revision: str | None,
    dtype: str | None,
    quantize: str | None,
    method: str | None,
    look: Look,
    *,
    json: bool,
) -> None:
    """Print, and draw, what the model's profile holds."""
    from teal_cli import pipeline
    from teal_cli.commands import profile_view
    from teal_cli.commands.results import deliver_figure
    from teal_cli.report import files
    from teal_cli.sparsity import stored
    from teal_cli.sparsity.plot import draw
    from teal_cli.sparsity.summary import summarise
    from teal_cli.store import models

    files.check_figure(look.plot)
    ref = models.resolve(model, revision)
    profile, path = pipeline.stored_profile(ref, dtype, quantize)
    (target,) = look.sparsity or (0.5,)
    summary = summarise(profile, target, method, layer=look.layer, site=look.site)
    if json:
        console.print_json({"profile": path, **summary.document()})
    else:
        profile_view.print_summary(summary)
        console.reporter().note(f"profile: {path or 'built into teal'}")
        checkpoint = path and pipeline.stored_checkpoint(ref, dtype, quantize)
        if path and checkpoint and (preset := stored.built_in(checkpoint)):
            console.reporter().note(f"in {stored.instead_of(preset, path)}")
    deliver_figure(draw, summary, look.plot)
