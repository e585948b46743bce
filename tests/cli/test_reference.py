"""docs/cli.md is what `--help` prints.

After a change of the options: UPDATE_DOCS=1 python -m pytest tests/cli/test_reference.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
INTRODUCTION = """\
# Command line reference

Made from `teal --help`; do not edit by hand (`tests/cli/test_reference.py` writes and checks it).

Results go to stdout, everything else to stderr. `NO_COLOR` turns colours off, `TEAL_HOME` puts
everything that teal stores into one folder, `TEAL_DEBUG=1` shows the traceback of an error.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | something failed |
| 2 | wrong usage |
| 3 | something is missing; the message names the command that makes it |
| 4 | access denied by the Hub |
| 5 | the device or the model is not supported |
| 130 | stopped with Ctrl-C |
"""


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "teal_cli", *command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"},
    )
    return done.stdout.rstrip()


def render() -> str:
    root = help_of()
    names = re.findall(r"^  (\S+)", root.split("Commands:\n")[1], re.MULTILINE)
    sections = [("teal", root)] + [(f"teal {name}", help_of(name)) for name in names]
    blocks = [f"## {title}\n\n```text\n{text}\n```\n" for title, text in sections]
    return "\n".join([INTRODUCTION, *blocks])


def test_the_reference_is_what_help_prints() -> None:
    page = render()
    if os.environ.get("UPDATE_DOCS") == "1":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
    assert page == PAGE.read_text(encoding="utf-8"), "run it again with UPDATE_DOCS=1"
