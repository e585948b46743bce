"""A clock that goes backwards: nothing is made anew, nothing is refused, no time is negative."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from benchmark.commands import runner

_YEARS_S = 10 * 365 * 86400


def test_a_clock_that_goes_back(
    tiny_model: Path,
    teal_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Sentence {n} says {n * n}.\n" for n in range(900)))
    options = [tiny_model, "--dataset", text, "--samples", "2", "--device", "cpu", "--offline"]

    def teal(name: str, *arguments: str | Path) -> tuple[str, str]:
        code, out, err = runner(name, monkeypatch, capsys)(*arguments)
        assert code == 0, err
        assert not re.search(r"(?<![\w.-])-\d+(\.\d+)? (s|min|h|B|\w+/s)\b", out + err), out + err
        return out, err

    calibrate = ("calibrate", *options, "--seq-len", "16", "--method", "uniform")
    evaluate = ("eval", *options, "--context", "16", "--sparsity", "0.4")
    profile, _ = teal(*calibrate)
    quality, _ = teal(*evaluate)
    files = {path: path.read_bytes() for path in teal_home.rglob("*.safetensors")}
    assert len(files) == 2

    # All was made ten years from now, and the clock still runs backwards.
    start = time.time()
    for path in teal_home.rglob("*"):
        os.utime(path, (start + _YEARS_S, start + _YEARS_S))
    now = [start]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    assert teal(*calibrate)[0] == profile
    assert teal(*evaluate)[0] == quality
    assert {path: path.read_bytes() for path in files} == files
    assert str(tiny_model) in teal("models")[0]
    teal(*calibrate, "--force")
    teal("convert", tiny_model, "--force")
    assert teal(*calibrate)[0] == profile
