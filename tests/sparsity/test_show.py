"""`teal calibrate --show`: what is in the profile, in the terminal, as data and as a figure."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from benchmark.commands import Command, prepare, runner

from teal_cli.commands import profile_view
from teal_cli.model.decoder import Decoder
from teal_cli.model.sites import PROJECTIONS, SITES
from teal_cli.progress import Silent
from teal_cli.sparsity.calibrate import SKIPPED_POSITIONS, calibrate
from teal_cli.sparsity.profile import Profile
from teal_cli.sparsity.summary import summarise


@pytest.fixture
def show(
    teal_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    command = runner("calibrate", monkeypatch, capsys)
    return lambda *arguments: command(*arguments, "--show")


@pytest.fixture
def profile(decoder: Decoder, tokens: torch.Tensor) -> Profile:
    return calibrate(decoder, tokens, model="tiny", reporter=Silent())


def test_histogram_is_the_activations_own(
    decoder: Decoder, tokens: torch.Tensor, profile: Profile
) -> None:
    seen: list[torch.Tensor] = []

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        if (layer, site) == (2, "mlp_act"):
            seen.append(x[SKIPPED_POSITIONS:].abs().flatten())

    for row in tokens:
        decoder.forward(row, observe=observe)
    values = torch.cat(seen).double().numpy()
    summary = summarise(profile, 0.5, "uniform", layer=2, site="mlp_act")
    (histogram,) = summary.histograms
    expected, _ = numpy.histogram(values, numpy.array(histogram.edges))
    assert numpy.abs(numpy.array(histogram.shares) - expected / len(values)).max() < 0.005
    assert histogram.beyond == pytest.approx(0.01, abs=1e-3)
    assert sum(histogram.shares) + histogram.beyond == pytest.approx(1)
    assert histogram.largest == pytest.approx(values.max(), rel=1 / 64)
    level = histogram.thresholds["down"]
    assert level == pytest.approx(float(summary.thresholds[2, PROJECTIONS.index("down")]))
    assert histogram.below["down"] == pytest.approx((values <= level).mean(), abs=0.005)


def test_table_is_what_the_method_allots(profile: Profile) -> None:
    summary = summarise(profile, 0.4)
    assert summary.method == profile.default_method
    assert profile.model_sparsity(summary.sparsity) == pytest.approx(0.4)
    assert torch.equal(summary.thresholds, profile.thresholds(0.4))
    lines = profile_view.heat_map(summary.sparsity.tolist())
    for layer, row in enumerate(summary.sparsity.tolist()):
        label, *cells = lines[2 + layer].plain.split()
        assert int(label) == layer
        assert cells == [f"{100 * value:.0f}" for value in row]


@pytest.mark.parametrize(("layers", "panels"), [(30, 1), (81, 2), (126, 2)])
def test_heat_map_has_every_layer_in_eighty_columns(layers: int, panels: int) -> None:
    rows = torch.rand(layers, 7, generator=torch.Generator().manual_seed(0)).tolist()
    lines = profile_view.heat_map(rows, panels=panels)
    assert max(len(line.plain) for line in lines) <= 80
    assert len(lines) == 3 + -(-layers // panels)
    text = " ".join(line.plain for line in lines[2:-1])
    assert len(text.split()) == 8 * layers
    styles = {str(span.style) for line in lines for span in line.spans}
    assert len(styles) > 20
    assert all(" on #" in style for style in styles)


def test_histograms_mark_every_threshold(profile: Profile) -> None:
    summary = summarise(profile, 0.5, layer=0)
    assert [histogram.site for histogram in summary.histograms] == list(SITES)
    for histogram in summary.histograms:
        lines = [line.plain for line in profile_view.histogram_lines(histogram)]
        assert max(map(len, lines)) <= 80
        (marks,) = [line for line in lines if "▲" in line]
        (names,) = lines[lines.index(marks) + 1 : lines.index(marks) + 2]
        assert set(names.split()) == set(histogram.thresholds)
        level = min(histogram.thresholds.values())
        assert marks.index("▲") - 10 == int(level / histogram.edges[-1] * 64)


def test_site_that_is_always_zero_can_be_drawn(profile: Profile) -> None:
    assert profile.counts is not None
    counts = profile.counts.clone()
    counts[0, 1] = 0
    counts[0, 1, 0] = 9
    dead = dataclasses.replace(
        profile, counts=counts, quantiles=type(profile.quantiles).from_counts(counts)
    )
    (histogram,) = summarise(dead, 0.5, "uniform", layer=0, site="attn_out").histograms
    assert histogram.shares[0] == 1
    assert any("▲" in line.plain for line in profile_view.histogram_lines(histogram))


def test_command_prints_table_thresholds_and_origin(show: Command, tiny_model: Path) -> None:
    prepare(tiny_model)
    code, out, err = show(tiny_model, "--method", "uniform", "--sparsity", "0.3")
    assert code == 0
    assert "method uniform at sparsity 0.3" in out
    assert f"   2{7 * '  30 '}\n" in out
    assert "\ndown  0.3 (0.3 … 0.3)" in out
    assert "dataset    random tokens" in out
    assert "\x1b" not in out
    assert "profile: " in err
    assert "calibrating" not in err

    code, out, _ = show(tiny_model, "--layer", "1", "--site", "mlp_in")
    assert code == 0
    assert out.count("share of the dense activations") == 1
    assert "layer 1, mlp_in" in out


def test_command_prints_the_same_as_data(show: Command, tiny_model: Path, teal_home: Path) -> None:
    prepare(tiny_model)
    code, out, _ = show(tiny_model, "--layer", "1", "--json")
    assert code == 0
    document = json.loads(out)
    (path,) = (teal_home / "data" / "profiles").rglob("*.safetensors")
    assert document["profile"] == str(path)
    profile = Profile.load(path)
    assert document["thresholds"] == profile.thresholds(0.5).tolist()
    assert document["method"] == profile.default_method
    assert [h["site"] for h in document["histograms"]] == list(SITES)


@pytest.mark.parametrize(
    ("name", "more"),
    [("map.png", ()), ("map.pdf", ("--layer", "0")), ("map.svg", ())],
    ids=["table", "histograms", "table-svg"],
)
def test_plot(
    show: Command, tiny_model: Path, tmp_path: Path, name: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib")
    prepare(tiny_model)
    code, _, err = show(tiny_model, "--plot", tmp_path / name, *more)
    assert code == 0, err
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[-3:]]
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--layer", "3"), 2, "no layer 3: they are 0 to 2"),
        (("--site", "mlp_in"), 2, "--site goes with --layer"),
        (("--method", "greedy"), 2, "no allocation 'greedy'"),
        (("--sparsity", "1"), 2, "a share from 0 to below 1"),
        (("--samples", "3"), 2, "leave out --samples"),
        (("--seq-len", "64"), 2, "leave out --seq-len"),
        (("--force",), 2, "leave out --force"),
        (("--import", "release"), 2, "leave out --import"),
        (("--plot", "map.gif"), 2, "must end in .png, .pdf or .svg"),
        (("--dtype", "float32"), 3, "no profile yet"),
    ],
)
def test_bad_input_is_one_error(
    show: Command, tiny_model: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    prepare(tiny_model)
    found, out, err = show(tiny_model, *arguments)
    assert found == code
    assert message in err
    assert out == ""


def test_without_a_profile_it_names_calibrate(show: Command, tiny_model: Path) -> None:
    code, out, err = show(tiny_model)
    assert code == 3
    assert f"error: {tiny_model} has no profile yet\n" in err
    assert f"teal calibrate {tiny_model}" in err
    assert out == ""


def test_options_of_show_need_it(
    teal_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = runner("calibrate", monkeypatch, capsys)
    for option in (("--sparsity", "0.5"), ("--layer", "0"), ("--plot", "map.png")):
        code, _, err = command("demo", *option)
        assert code == 2
        assert f"{option[0]} goes with --show" in err


def test_built_in_profile_is_shown_without_its_model(show: Command, tmp_path: Path) -> None:
    code, out, err = show("mistralai/Mistral-7B-v0.1", "--layer", "31", "--json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    assert document["profile"] is None
    assert len(document["sparsity"]) == 32


def test_colours_only_on_a_terminal(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    outputs = []
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        monkeypatch.setattr("sys.stdout", Terminal())
        profile_view.print_summary(summarise(profile, 0.5))
        outputs.append(sys.stdout.getvalue())  # type: ignore[attr-defined]
    assert "48;5;" in outputs[0]
    assert "48;5;" not in outputs[1]
