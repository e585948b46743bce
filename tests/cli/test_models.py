"""`teal models` as a user runs it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from teal_cli import app, console

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    teal_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Run:
    """Run `teal` in this process; `answer` is what a person at a terminal types."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def call(*arguments: str | Path, answer: str | None = None) -> tuple[int, str, str]:
        class Keys(io.StringIO):
            def isatty(self) -> bool:
                return answer is not None

        monkeypatch.setattr(console, "_settings", console._Settings())
        monkeypatch.setattr(sys, "argv", ["teal", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Keys(answer or ""))
        with pytest.raises(SystemExit) as exit_:
            app.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


def test_what_is_stored_is_listed_and_removed(run: Run, tiny_model: Path, teal_home: Path) -> None:
    code, out, err = run("models")
    assert (code, out) == (0, "")
    assert "no models are stored yet" in err
    assert run("convert", tiny_model, "-q")[0] == 0

    code, out, err = run("models")
    assert (code, err) == (0, "")
    title, row, total = out.splitlines()
    assert total.startswith("total: ")
    assert total.endswith(" kB")
    assert title.startswith(f"{tiny_model}, last used 20")
    form, _, unit, stage = row.split()
    assert (form, unit, stage) == ("float16", "kB", "converted")
    document = json.loads(run("models", "--json")[1])
    assert [model["model"] for model in document] == [str(tiny_model)]
    assert document[0]["checkpoints"][0]["bytes"] > 10_000
    assert document[0]["download"] is None

    code, out, err = run("models", "--remove", tiny_model)
    assert (code, out) == (2, "")
    assert "--yes" in err
    for answer in ("n\n", "\n", ""):
        code, out, err = run("models", "--remove", tiny_model, answer=answer)
        assert (code, out) == (0, "")
        assert f"Remove {tiny_model}?" in err
    assert run("models")[1]
    code, out, err = run("models", "--remove", tiny_model, answer="y\n")
    assert (code, out) == (0, "")
    assert "removed " in err
    assert run("models")[1] == ""
    assert tiny_model.is_dir()
    code, out, err = run("models", "--remove", tiny_model, "--yes")
    assert (code, out) == (3, "")
    assert "`teal models` lists what is" in err


def test_what_stays_in_the_hubs_cache_is_said(run: Run, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(bytes(2000))
    fields = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64}
    (snapshot / "config.json").write_text(
        json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **fields})
    )
    code, out, _ = run("models")
    assert code == 0
    assert "Hub's cache" in out
    assert " downloaded" in out
    assert max(map(len, out.splitlines())) < 60
    code, _, err = run("models", "--remove", "org/tiny", "--yes")
    assert code == 3
    assert "`hf cache rm model/org/tiny`" in err


@pytest.mark.parametrize(
    ("words", "begun", "offered"),
    [
        ("teal chat ", "", ["demo", "MODEL"]),
        ("teal chat de", "de", ["demo"]),
        ("teal models --remove ", "", ["MODEL"]),
        ("teal models --remove x", "x", []),
    ],
)
def test_shells_complete_models_without_torch(
    run: Run,
    tiny_model: Path,
    teal_home: Path,
    tmp_path: Path,
    words: str,
    begun: str,
    offered: list[str],
) -> None:
    import os
    import subprocess

    from teal_cli.store import artifacts, paths

    folder = paths.model_dir("org--tiny") / "float16"
    artifacts.write_manifest(folder / "manifest.json", "checkpoint", {"model": "org/tiny"})
    code = (
        "import sys\nfrom teal_cli import app\n"
        "try:\n    app.main()\nfinally:\n"
        "    print([m for m in ('torch', 'huggingface_hub') if m in sys.modules], file=sys.stderr)"
    )
    completion = {"_TEAL_COMPLETE": "complete_bash", "COMP_WORDS": words}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **completion, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )
    assert done.stderr.strip() == "[]"
    assert done.stdout.split() == [name.replace("MODEL", "org/tiny") for name in offered]


def test_paths_are_completed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from teal_cli.options import complete_model

    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    for folder in ("model-a", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model-a" / "config.json").touch()
    (tmp_path / "model.gguf").touch()
    assert complete_model("mo") == ["model-a", "model.gguf"]
    assert complete_model("./o") == ["./other/"]
    assert complete_model("") == ["demo", "model-a", "model.gguf"]
