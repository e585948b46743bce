"""Output: streams, quiet, terminals, and figures as people read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from terminals import terminal

from teal_cli import console
from teal_cli.amounts import format_amount, format_left, format_rate, format_seconds
from teal_cli.console import ConsoleReporter
from teal_cli.errors import TealError, UsageError
from teal_cli.options import parse_sparsities, parse_sparsity
from teal_cli.progress import Road

SCRIPT = """
import sys
from teal_cli import console
reporter = console.reporter()
with reporter.task("Reading", 3_000_000, "B") as task:
    for _ in range(3):
        task.advance(1_000_000)
    reporter.note("a [note] that is longer than a terminal is wide: " + "x" * 80)
with reporter.task("Layers", 2, "layers") as outer:
    with reporter.task("Rows") as inner:
        inner.advance()
    outer.advance(2)
console.print_dim("statistics")
"""


def test_a_terminal_shows_bars_and_keeps_one_line_a_task() -> None:
    out = terminal(SCRIPT, NO_COLOR="")
    assert "━" in out
    assert "\x1b[2mstatistics" in out
    # rich erases a line by moving up; what is left is what was printed last.
    assert re.search(r"Reading: 3\.0 MB in \d+\.\d s", out)
    assert re.search(r"Layers: 2 layers in", out)
    assert "x" * 80 in out.replace("\r\n", "")
    assert out.rstrip().endswith("statistics\x1b[0m")


ROAD = """
import time
from teal_cli import console
reporter = console.reporter()
reporter.expect([None, None, 4.0])
with reporter.task("Downloading", 20, "B") as task:
    for _ in range(4):
        task.advance(5)
        time.sleep(0.1)
reporter.expect([0, 4.0, 40.0])
reporter.skip()
with reporter.task("calibrating", 4, "layers") as task:
    for _ in range(4):
        time.sleep(0.2)
        task.advance()
reporter.expect([4.0])
with reporter.task("dense", 4, "layers") as task:
    time.sleep(0.3)
    task.advance(4)
    time.sleep(0.3)
reporter.expect(())
with reporter.task("evaluating", 1, "passes") as task:
    task.advance()
"""


def test_steps_of_one_road_share_a_bar_and_a_line() -> None:
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal(ROAD, COLUMNS="120"))
    assert "step 1 of 3: Downloading" in out
    assert "5 s left in this step" in out
    assert "left in this step" not in out.split("step 3 of 4")[1]
    assert re.search(r"step 4 of 4: dense .*4 of 4 layers, about 5 s left", out)
    assert "step 3 of 4: calibrating" in out
    assert re.search(r"3 of 4 layers, about \d+ s left", out)
    assert "step 4 of 4: dense" in out
    lines = out.splitlines()
    assert any(re.search(r"4 steps in \d\.\d s$", line) for line in lines)
    assert not any(re.search(r"(Downloading|calibrating|dense): .* in ", line) for line in lines)
    assert re.search(r"evaluating: 1 passes in", out)
    assert "step 5" not in out


def test_elsewhere_each_step_has_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    reporter.expect([None, 4.0])
    for label in ("Downloading", "calibrating"):
        with reporter.task(label, 2, "it") as task:
            task.advance(2)
    reporter.expect(())
    with reporter.task("one", 2):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 1 of 2: Downloading (2 it) ..."
    assert lines[2] == "step 2 of 2: calibrating (2 it) ..."
    assert [line.partition(":")[0] for line in lines[4:]] == ["one (2 it) ...", "one"]
    assert len(lines) == 6


def test_what_is_left_is_told_from_measured_rates() -> None:
    road = Road()
    road.expect([None, 16.0, 0, 64.0])
    assert road.begin()
    assert road.left_s(3.0, 1.0) is None  # how long calibration takes is not known yet
    road.finish(4.0)
    assert road.begin()
    assert road.left_s(6.0, 2.0) == 6 + 64 * (2 + 6) / 16
    road.finish(8.0)
    assert road.begin()  # done already, free
    road.finish(0.0)
    assert (road.steps, road.total) == (3, 4)
    assert road.begin()
    assert road.left_s(30.0, 2.0) == 30.0
    assert not road.begin()
    road.expect([4.0, None])
    road.begin()
    assert road.left_s(1.0, 1.0) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "5 s"), (38, "40 s"), (57, "55 s"), (58, "1 min"), (130, "2 min"), (5000, "1 h 20 min")],
)
def test_what_is_left_is_no_more_exact_than_it_is(seconds: float, text: str) -> None:
    assert format_left(seconds) == text


def test_no_color_and_dumb_terminals() -> None:
    colours = re.compile(r"\x1b\[[0-9;]*m")
    assert not colours.search(terminal(SCRIPT, NO_COLOR="1").replace("\x1b[0m", ""))
    assert "\x1b" not in terminal(SCRIPT, term="dumb")


def test_elsewhere_a_task_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    reporter.note("starting")
    with reporter.task("Reading", 2_000_000, "B") as task:
        task.advance(2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:2] == ["starting", "Reading (2.0 MB) ..."]
    assert re.fullmatch(r"Reading: 2\.0 MB in 0\.0 s", lines[2])


def test_a_task_that_fails_does_not_say_that_it_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match="broken"), ConsoleReporter().task("Reading"):
        raise ValueError("broken")
    assert capsys.readouterr().err == "Reading ...\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(quiet=True)
    reporter.note("starting")
    with reporter.task("Reading", 2) as task:
        task.advance(2)
    assert capsys.readouterr() == ("", "")


def test_json_is_one_valid_document(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Row:
        name: str
        value: float

    console.print_json(
        {"rows": [Row("ü", 1.5), Row("b", float("inf"))], "at": Path("x"), 3: (1, float("nan"))}
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "rows": [{"name": "ü", "value": 1.5}, {"name": "b", "value": None}],
        "at": "x",
        "3": [1, None],
    }


def test_a_table_is_aligned_and_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(
        ["name", "tokens/s"], [["dense", "9.5"], ["50 %", "110.2"]], title=["Speed"]
    )
    assert capsys.readouterr().out == ("Speed\nname   tokens/s\ndense       9.5\n50 %      110.2\n")


def test_a_table_that_is_wider_than_the_terminal_comes_in_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "16")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.print_table(["name", "one", "two", "a long column"], [["dense", "1", "2", "3"]])
    assert capsys.readouterr().out == (
        "name   one  two\ndense    1    2\n\nname   a long column\ndense              3\n"
    )


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1000, "B", "1.0 kB"),
        (98_362_432, "B", "98.4 MB"),
        (13.2e9, "B", "13.2 GB"),
        (2.5e12, "B", "2.5 TB"),
        (3, "layers", "3 layers"),
        (3.25, "it", "3.2 it"),
        (1234.5, "it", "1234 it"),
    ],
)
def test_amounts(amount: float, unit: str, text: str) -> None:
    assert format_amount(amount, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (42, "42 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("per_s", "unit", "text"),
    [(12.3, "layers", "12 layers/s"), (0.04, "layers", "25 s each"), (0.4, "B", "0 B/s")],
)
def test_rates(per_s: float, unit: str, text: str) -> None:
    assert format_rate(per_s, unit) == text


def test_sparsities_are_a_list_without_repeats() -> None:
    assert parse_sparsities("0.25, 0.4,40%,0") == (0.25, 0.4, 0.0)


@pytest.mark.parametrize(
    "text", ["", "0.5,", "a", "1", "0.5,1.2", "nan", "-0.1", "100%", "4%0", "%", "0.4%%", "-1%"]
)
def test_bad_sparsities_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match=r"a share from 0 to below 1, not"):
        parse_sparsities(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("40", "40 % is written 0.4 or 40%."),
        ("1.5", "1.5 % is written 0.015 or 1.5%."),
        ("0,4", "has a point"),
    ],
)
def test_a_percentage_without_its_sign_is_explained(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_sparsity(text)
    assert said in str(error.value.hint)


HOSTILE = "evil\x1b[2J\x1b]0;title\x07\u202egnp.exe\x9b31m[bold]:fire:\x7f"
SHOWN = "evilgnp.exe31m[bold]:fire:"


def test_text_of_others_is_made_printable_wherever_it_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_settings", console._Settings())
    monkeypatch.setenv("TEAL_DEBUG", "1")
    reporter = ConsoleReporter()
    reporter.note(HOSTILE)
    with reporter.task(HOSTILE, 1):
        pass
    console.print_dim(HOSTILE)
    console.print_line(HOSTILE)
    console.print_table([HOSTILE, "x"], [[HOSTILE, HOSTILE]], title=[HOSTILE])
    console.print_groups([(HOSTILE, [[HOSTILE, HOSTILE]])])
    console.report(TealError(HOSTILE, hint=HOSTILE))
    console.report(ValueError(HOSTILE))
    console.print_json({HOSTILE: [HOSTILE]})
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x07\u202e\x9b\x7f")
    assert out.count(SHOWN) == 1 + 4 + 3
    assert err.count(SHOWN) >= 1 + 2 + 1 + 2 + 1
    assert json.loads(out[out.index("{\n") :]) == {HOSTILE: [HOSTILE]}


def test_a_line_of_others_looks_like_no_message_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.report(TealError("the template says: x\nerror: the disk is full\nx"))
    ConsoleReporter().note("reading a\nerror: b")
    console.print_table(["a\nerror: b", "c"], [["d\ne", "f"]])
    out, err = capsys.readouterr()
    assert err == (
        "error: the template says: x\n  error: the disk is full\n  x\nreading a error: b\n"
    )
    assert out == "a error: b  c\nd e         f\n"


def test_a_bar_shows_text_of_others_as_it_is() -> None:
    script = f"""
import time
from teal_cli import console
reporter = console.reporter()
with reporter.task({HOSTILE!r}, 3) as task:
    reporter.note({HOSTILE!r})
    time.sleep(0.3)
    task.advance(3)
"""
    out = terminal(script)
    assert out.count(SHOWN) >= 3
    assert not set(out) & set("\x07\u202e\x9b\x7f")
    assert "\x1b[2J" not in out
    assert "🔥" not in out


def test_a_path_goes_to_a_program_byte_for_byte() -> None:
    path = Path(os.fsdecode(b"/models/caf\xe9\x1b[2J"))
    script = f"""
import sys
from pathlib import Path
from teal_cli import console
sys.stdout.reconfigure(errors="replace")
console.print_path(Path({str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.stdout == b"/models/caf\xe9\x1b[2J\n"
    assert "\x1b[2J" not in terminal(script)
