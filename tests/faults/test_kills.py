"""Commands that are killed anywhere: run again, they make what an undisturbed run makes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import hub_server
import pytest
import tiny
from faults.killing import beside, run

_DATE = re.compile(rb"\d{4}-\d\d-\d\dT[\d:]+\+00:00")  # of the calibration, in its profile
KILLS_AT_LEAST = 5
KILLS = [
    pytest.param(KILLS_AT_LEAST, id="few"),
    pytest.param(50, id="many", marks=pytest.mark.slow),
]

Result = Callable[[str], tuple[dict[str, Any], int]]
Begin = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The commands on a model and a text that are as small as they can be."""
    folder = tiny.write_model(
        tmp_path_factory.mktemp("model") / "model",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"Sentence {n} says {n * n}.\n" for n in range(900)))
    common = ["--dataset", str(text), "--samples", "2", "--device", "cpu", "--offline"]
    return {
        "convert": ["convert", str(folder)],
        "calibrate": ["calibrate", str(folder), "--seq-len", "16", "--method", "uniform", *common],
        "eval": ["eval", str(folder), "--context", "16", "--sparsity", "0", "--json", *common],
    }


def made(home: Path) -> dict[str, Any]:
    """Every file of a home but the locks, and the result without what a clock says."""
    files: dict[str, Any] = {
        str(path.relative_to(home)): _DATE.sub(b"DATE", path.read_bytes())
        for path in home.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
    text = beside(home, "output").read_text()
    result = json.loads(text) if text.startswith("{") else text.replace(str(home), "HOME")
    return files | {"output": timeless(result)}


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("_s", "time", "date", "path"))}
        return {k: timeless(v) for k, v in kept.items()}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(
    arguments: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, Begin]:
    """What a run that nothing disturbs makes and how often it touches a file; and its start."""

    calibrated: Path | None = None

    def begin(home: Path, command: str) -> Path:
        """A home; an evaluation's has the profile already, which takes longer than itself."""
        nonlocal calibrated
        if command != "eval":
            home.mkdir()
            return home
        if calibrated is None:
            calibrated = tmp_path_factory.mktemp("calibrated") / "home"
            calibrated.mkdir()
            assert run(calibrated, arguments["calibrate"]) == 0
        return Path(shutil.copytree(calibrated, home))

    @cache
    def result(command: str) -> tuple[dict[str, Any], int]:
        home = begin(tmp_path_factory.mktemp("whole") / "home", command)
        assert run(home, arguments[command]) == 0
        return made(home), int(beside(home, "touches").read_text())

    return result, begin


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("command", ["convert", "calibrate", "eval"])
def test_rerun_equals_an_undisturbed_run(
    command: str,
    kills: int,
    arguments: dict[str, list[str]],
    undisturbed: tuple[Result, Begin],
    tmp_path: Path,
) -> None:
    result, begin = undisturbed
    expected, touches = result(command)
    assert not [name for name in expected if ".partial-" in name]
    # Where a command is done sooner than it can be killed so often, everywhere.
    places = random.Random(command).sample(range(1, touches), min(kills, touches - 1))
    assert len(places) >= KILLS_AT_LEAST
    for place in places:
        home = begin(tmp_path / f"killed-{place}", command)
        assert run(home, arguments[command], kill_at=place) == -9
        assert run(home, arguments[command]) == 0, place
        found = made(home)
        assert found.keys() == expected.keys(), place
        for name, content in expected.items():
            assert found[name] == content, (place, name)


def test_kills_upon_kills_leave_nothing_behind(
    arguments: dict[str, list[str]],
    undisturbed: tuple[Result, Begin],
    tmp_path: Path,
) -> None:
    """One home, killed ever later, until nothing is left to kill."""
    expected, touches = undisturbed[0]("calibrate")
    home = tmp_path / "home"
    home.mkdir()
    for place in range(touches // 6, touches, touches // 6):
        run(home, arguments["calibrate"], kill_at=place)
    assert run(home, arguments["calibrate"]) == 0
    assert made(home).keys() == expected.keys()


def test_two_at_once_make_everything_once(
    arguments: dict[str, list[str]],
    undisturbed: tuple[Result, Begin],
    tmp_path: Path,
) -> None:
    """Two evaluations of a model that is neither converted nor calibrated."""
    expected, _ = undisturbed[0]("eval")
    shared = tmp_path / "shared"
    shared.mkdir()
    processes = [tmp_path / name for name in ("one", "other")]
    home = {"TEAL_HOME": str(shared)}
    with ThreadPoolExecutor() as pool:
        codes = pool.map(lambda own: run(own, arguments["eval"], environment=home), processes)
        assert list(codes) == [0, 0]
    outputs = [timeless(json.loads(beside(own, "output").read_text())) for own in processes]
    assert outputs[0] == outputs[1]
    beside(processes[0], "output").rename(beside(shared, "output"))
    assert made(shared).keys() == expected.keys()


@pytest.mark.parametrize("kills", KILLS)
def test_a_download_that_is_run_again_equals_an_undisturbed_one(kills: int, tmp_path: Path) -> None:
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 40_000 for i in (1, 2)}
    files = {name: json.dumps(name).encode() for name in [*small, "model.safetensors.index.json"]}

    def download(home: Path, kill_at: int = 0) -> int:
        home.mkdir(exist_ok=True)
        environment = hub.environment(home)
        return run(home, ["download", "org/model"], kill_at=kill_at, environment=environment)

    def found(home: Path) -> dict[str, Any]:
        """All but the crumbs of the client: its tag, a commit's name, empty files."""
        return {
            name: content
            for name, content in made(home).items()
            if content != b"" and not name.endswith(("CACHEDIR.TAG", ".tmp"))
        }

    with hub_server.running() as hub:
        hub.repositories["org/model"] = hub_server.Repository({**files, **shards})
        whole = tmp_path / "whole"
        assert download(whole) == 0
        expected = found(whole)
        assert sum(name.endswith(".safetensors") for name in expected) == len(shards)
        touches = int(beside(whole, "touches").read_text())
        # The client's threads share the small files: not every run comes to the last touches.
        codes = []
        for place in random.Random(0).sample(range(1, touches - 5), kills):
            home = tmp_path / f"killed-{place}"
            codes.append(download(home, kill_at=place))
            assert download(home) == 0, place
            assert found(home) == expected, place
        assert set(codes) <= {0, -9}
        assert codes.count(-9) > kills / 2
