"""`teal calibrate`: learn a model's activation thresholds from text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli import console
from teal_cli.commands.calibrate_show import Look, check_show, show_profile
from teal_cli.errors import UsageError
from teal_cli.model.sites import PROJECTIONS, SITE_OF, SITES
from teal_cli.options import (
    ColumnOption,
    DatasetOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    ThreadsOption,
    TokenOption,
    check_sparsities,
    parse_sparsities,
)

if TYPE_CHECKING:
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.progress import Reporter
    from teal_cli.sparsity.profile import Profile

_SHOWN = (0.25, 0.4, 0.5)

SamplesOption = Annotated[
    int | None,
    typer.Option("--samples", min=1, help="Windows of text to read. [default: 16]"),
]
SeqLenOption = Annotated[
    int | None,
    typer.Option("--seq-len", min=8, help="Tokens in a window. [default: 512]"),
]
CalibrationSeedOption = Annotated[
    int | None, typer.Option("--seed", help="Chooses the windows. [default: 0]")
]
CalibrationMethodOption = Annotated[
    Literal["sensitivity", "greedy", "uniform"] | None,
    typer.Option(
        "--method",
        help="How to share sparsity out over layers and projections; a profile holds several."
        " 'sensitivity' by what it does to the loss, 'greedy' by each block's output error,"
        " 'uniform' equally, which every profile can. [default: sensitivity]",
    ),
]
ImportOption = Annotated[
    Path | None,
    typer.Option(
        "--import",
        metavar="DIR",
        help="Take a copy of the TEAL release for this model (folders histograms and lookup)"
        " instead of reading text.",
    ),
]
ShowOption = Annotated[
    bool,
    typer.Option(
        "--show",
        help="Show what the stored profile holds, and calibrate nothing: the sparsity that"
        " --method gives each layer and projection, or the histograms of --layer.",
    ),
]
RecoverOption = Annotated[
    bool,
    typer.Option(
        "--recover",
        help="Learn vectors that win back what sparsity loses, and add them to the profile:"
        " biases and norms for sparse decoding, from the dense model's own predictions. Reads 200"
        " windows of 2048 tokens on a GPU, 50 of 512 on a CPU. Weights stay as they are.",
    ),
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="LIST",
        help="With --recover: the targets to learn for, separated by commas."
        " [default: 0.25,0.4,0.5,0.65] With --show: the target to look up. [default: 0.5]",
        callback=check_sparsities,
    ),
]
LayerOption = Annotated[
    int | None,
    typer.Option("--layer", min=0, help="With --show: show this layer's histograms of abs(x)."),
]
SiteOption = Annotated[
    Literal["attn_in", "attn_out", "mlp_in", "mlp_act"] | None,
    typer.Option("--site", help="With --layer: only this input site. [default: all four]"),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="With --show: also draw it, as a .png, .pdf or .svg file."),
]


def calibrate(
    model: ModelArgument = None,
    dataset: DatasetOption = None,
    column: ColumnOption = None,
    samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    seed: CalibrationSeedOption = None,
    method: CalibrationMethodOption = None,
    recover: RecoverOption = False,
    sparsity: TargetsOption = None,
    import_dir: ImportOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Calibrate again even if it is up to date.")
    ] = False,
    show: ShowOption = False,
    layer: LayerOption = None,
    site: SiteOption = None,
    plot: PlotOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Learn a model's activation thresholds from text, and store them as its profile.

    Does nothing when the model has a profile that was made with the options given. An
    interrupted calibration goes on where it was, and another method of the same text adds to the
    profile what it lacks.

    With --recover, learn vectors that win back much of what sparsity loses. eval, chat and bench
    use them where the profile has them. Takes a GPU minutes, and a CPU long.
    """
    asked = {"dataset": dataset, "column": column, "samples": samples, "seq_len": seq_len}
    given: dict[str, Any] = {k: v for k, v in {**asked, "seed": seed}.items() if v is not None}
    targets = None if sparsity is None else parse_sparsities(sparsity)
    look = Look(targets, layer, site, plot)
    if show:
        flags = {"import": import_dir, "force": force or None, "recover": recover or None}
        check_show(given | flags, look)
        show_profile(model, revision, dtype, quantize, method, look, json=json)
        return
    _check_no_show(given, look, import_dir, recover, {"method": method, "quantize": quantize})

    from teal_cli import pipeline
    from teal_cli.sparsity import stored
    from teal_cli.store import models
    from teal_cli.threads import use_threads

    use_threads(threads)
    ref = models.resolve(model, revision)
    where: dict[str, Any] = {"device": device, "offline": offline, "reporter": console.reporter()}
    checkpoint = pipeline.ensure_checkpoint(
        ref, dtype=dtype, quantize=quantize, thresholds="best", token=token, **where
    )
    limit = checkpoint.config.context_length
    if seq_len is not None and seq_len > limit:
        raise UsageError(f"--seq-len {seq_len} is beyond this model's context of {limit} tokens")
    if recover:
        from teal_cli.recovering import ensure_recovery

        profile = ensure_recovery(
            checkpoint, given, method=method, targets=targets, force=force, **where
        )
    elif import_dir is not None:
        profile = _import(checkpoint, import_dir, where["reporter"], force=force)
    else:
        profile = _learn(checkpoint, given, method, force=force, **where)
    path = stored.profile_path(checkpoint)
    _report(profile, path if path.exists() else None, json=json)


def _check_no_show(
    given: dict[str, Any],
    look: Look,
    import_dir: Path | None,
    recover: bool,
    others: dict[str, Any],
) -> None:
    for name, value in asdict(look).items():
        if value is not None and not (recover and name == "sparsity"):
            also = " or --recover" if name == "sparsity" else ""
            raise UsageError(f"--{name} goes with --show{also}")
    if import_dir is None:
        return
    if recover:
        raise UsageError("--import reads a release, and --recover learns: one after the other")
    if given:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--import reads no text: leave out --{option}")
    if others["method"] is not None:
        raise UsageError("--import brings the release's own allocation: leave out --method")
    if others["quantize"] is not None:
        raise UsageError("--import brings thresholds of float weights: leave out --quantize")


def _learn(
    checkpoint: Checkpoint,
    given: dict[str, Any],
    method: str | None,
    *,
    force: bool,
    device: str,
    offline: bool,
    reporter: Reporter,
) -> Profile:
    """The profile that is there, if it was made as asked, else a new one."""
    from teal_cli import pipeline
    from teal_cli.sparsity import stored
    from teal_cli.text.sample import SampleSettings

    found = None if force else stored.usable_or_built_in(checkpoint)
    if found is not None and (found.quick or not stored.made_as_asked(found, given)):
        found = None
    if found is not None and (method is None or method in found.methods):
        reporter.note("up to date: --force calibrates again")
        reporter.expect(())
        return found
    before = found.provenance.get("settings", {}) if found is not None else {}
    stored.note_replacing(checkpoint, reporter)
    return pipeline.make_profile(
        checkpoint,
        SampleSettings(**(before | given)) if before or given else None,
        method=method,
        force=force,
        device=device,
        offline=offline,
        reporter=reporter,
    )


def _import(checkpoint: Checkpoint, folder: Path, reporter: Reporter, *, force: bool) -> Profile:
    """Store a TEAL release as the model's profile."""
    from teal_cli.sparsity import stored
    from teal_cli.sparsity.release import import_release
    from teal_cli.store import artifacts

    profile = import_release(
        folder, checkpoint.config, model=checkpoint.name, fingerprint=checkpoint.fingerprint
    )
    path = stored.profile_path(checkpoint)
    with artifacts.lock(path, reporter):
        own = stored.usable_profile(checkpoint)
        if not force and own is not None and own.provenance != profile.provenance:
            stored.check_replaceable(checkpoint, own)
        stored.note_replacing(checkpoint, reporter)
        profile.save(path)
    reporter.expect(())
    return profile


def _report(profile: Profile, path: Path | None, *, json: bool) -> None:
    """Print a profile's thresholds; without a path, it is one that teal brings."""
    if json:
        console.print_json(_document(profile, path))
    else:
        _print_summary(profile)
        console.reporter().note(f"profile: {path or 'built into teal'}")


def _document(profile: Profile, path: Path | None) -> dict[str, Any]:
    return {
        "model": profile.model,
        "profile": path,
        "fingerprint": profile.fingerprint,
        "methods": profile.methods,
        "provenance": dict(profile.provenance),
        "projections": PROJECTIONS,
        "thresholds": {f"{value:g}": profile.thresholds(value).tolist() for value in _SHOWN},
        "recovery": {method: found.header() for method, found in profile.recovery.items()},
    }


def _print_summary(profile: Profile) -> None:
    """The thresholds of each site where every projection has the same sparsity."""
    from statistics import median

    tables = [profile.thresholds(value, "uniform") for value in _SHOWN]
    rows = []
    for site in SITES:
        projections = [name for name in PROJECTIONS if SITE_OF[name] == site]
        columns = [table[:, PROJECTIONS.index(projections[0])].tolist() for table in tables]
        cells = [f"{median(c):.3g} ({min(c):.3g} … {max(c):.3g})" for c in columns]
        rows.append([f"{site} → {', '.join(projections)}", *cells])
    layers = profile.shape.num_hidden_layers
    console.print_table(
        ["threshold at", *(f"{value:g}" for value in _SHOWN)],
        rows,
        title=[f"{profile.model}: median of {layers} layers (lowest … highest)"],
    )
    for method, found in profile.recovery.items():
        learnt = ", ".join(f"{target:g}" for target in found.targets[1:])
        console.reporter().note(f"vectors for {method} at {learnt}")
