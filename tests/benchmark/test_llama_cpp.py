"""llama.cpp as a baseline: its program, or one that stands in for it, and what it is given."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark.subjects import TINY

from teal_cli.benchmark import bench, llama_cpp, random_gguf
from teal_cli.benchmark.bandwidth import Bandwidth
from teal_cli.benchmark.llama_cpp import LlamaCppDecoding, llama_cpp_decoding
from teal_cli.errors import MissingError, TealError, UnsupportedError
from teal_cli.model.config import ModelConfig
from teal_cli.model.decoder import Decoder
from teal_cli.model.gguf_tensors import GgufTensors
from teal_cli.model.quantization import QUANTIZATIONS
from teal_cli.model.random_weights import SHAPES, random_decoder
from teal_cli.progress import Silent

CPU = torch.device("cpu")
WHOLE = dataclasses.replace(
    TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, sliding_windows=(None,) * TINY.num_hidden_layers,
)  # fmt: skip
# Prints what it was called with, and a time for each thing that it was asked for.
GOOD = """
import json, os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(os.environ["CALLS"], "a") as file:
    json.dump({**words, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}, file)
    file.write(chr(10))
p, n = int(words["-p"]), int(words["-n"])
common = {"model_type": "llama 1B Q8_0", "build_commit": "abc1234"}
print("a line before the document")
print(json.dumps([{**common, "n_prompt": p, "n_gen": 0, "avg_ns": 2000000 * p},
                  {**common, "n_prompt": 0, "n_gen": n, "avg_ns": 5000000 * n}]))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a Python program on the PATH as llama-bench; gives the calls of a good one."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("TEAL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TEAL_LLAMA_BENCH", raising=False)

    def put(source: str = GOOD) -> Path:
        program = tmp_path / "bin" / "llama-bench"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{source}")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return program

    return put


def calls(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def tiny(quantize: str | None = None, config: ModelConfig = WHOLE) -> Decoder:
    kind = QUANTIZATIONS[quantize] if quantize else None
    return random_decoder(config, device="cpu", dtype=torch.float16, seed=0, kind=kind)


def decoding(gguf: Path, device: torch.device = CPU) -> LlamaCppDecoding:
    return LlamaCppDecoding(gguf, 6, 10, device, 3)


def test_it_is_a_row_like_the_others(stand_in: Any, tmp_path: Path) -> None:
    stand_in()
    settings = bench.Settings((), tokens=4, prompt_tokens=3, repeats=2, baselines=("llama.cpp",))
    _, rows, notes = bench.measure(
        tiny("int8"), [3, 4, 5], settings, lambda session, sparsity: None,  # type: ignore[arg-type, return-value]
        lambda: Bandwidth(30e9, "a guess"), Silent(),
    )  # fmt: skip
    dense, theirs = rows
    assert notes == ()
    assert (theirs.label, theirs.kind, theirs.dtype) == ("llama.cpp", "baseline", "Q8_0")
    assert theirs.backend == "llama-bench abc1234, random weights at this shape"
    assert theirs.time_per_token_ms.median == pytest.approx(5)
    assert theirs.time_to_first_token_ms.median == pytest.approx(6)
    assert theirs.prompt_tokens_per_s.median == pytest.approx(500)
    assert set(dense.speedup) == {"llama.cpp"}
    asked = calls(tmp_path)
    assert [(call["-p"], call["-n"]) for call in asked] == [("1", "1"), ("3", "4"), ("3", "4")]
    assert {call["-t"] for call in asked} == {str(torch.get_num_threads())}
    assert not Path(asked[0]["-m"]).exists()  # the weights that were written for it


def test_a_models_own_file_is_given_to_it(stand_in: Any, tmp_path: Path) -> None:
    stand_in()
    own = tmp_path / "own.gguf"
    random_gguf.write(own, WHOLE, torch.float16, None)
    found = llama_cpp_decoding(tiny(), own, 6, 10, Silent())
    assert found.about() == ("Q8_0", "llama-bench abc1234, the model's own file")
    assert calls(tmp_path)[0]["-m"] == str(own)
    stored = sum(tensor.nbytes for tensor in GgufTensors(own).tensors.values())
    assert stored - 250 * 64 * 2 <= found.bytes_per_token(WHOLE) <= stored + 10 * 4096


@pytest.mark.parametrize(
    ("device", "layers", "gpus"), [("cpu", "0", ""), ("cuda", "99", "0"), ("cuda:1", "99", "1")]
)
def test_a_gpu_only_where_ours_runs_on_one(
    device: str, layers: str, gpus: str, stand_in: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stand_in()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    decoding(tmp_path / "x.gguf", torch.device(device)).run()
    (call,) = calls(tmp_path)
    assert (call["-ngl"], call["gpus"]) == (layers, gpus)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import sys; sys.exit('error: failed to load model')",
         "failed with exit code 1: error: failed to load model"),
        ("import os; os.kill(os.getpid(), 4)", "was ended by SIGILL, an instruction that"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("print('| model | size |')", "printed no JSON"),
        ("print('[{')", "printed no JSON"),
        ("print('[]')", "measured nothing"),
        ("print('[1]')", "JSON of another kind"),
        ("print('[{\"n_prompt\": 6}]')", "JSON of another kind"),
        (GOOD.replace("5000000 * n", "0"), "JSON of another kind"),
        (GOOD.replace('"n_gen": n', '"n_gen": 7'), "something else than it was asked for"),
        ("import time; time.sleep(60)", "takes more than"),
    ],
    ids=["fails", "sigill", "killed", "table", "half", "nothing", "numbers", "fields", "no-time",
         "other-test", "hangs"],
)  # fmt: skip
def test_what_fails_is_a_sentence(
    source: str, sentence: str, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(source)
    if "sleep" in source:
        monkeypatch.setattr(llama_cpp, "_SECONDS", 0.5)
    with pytest.raises(TealError, match=sentence):
        decoding(tmp_path / "x.gguf").run()


def test_a_failure_leaves_the_other_rows(stand_in: Any) -> None:
    stand_in("import sys; sys.exit('no')")
    settings = bench.Settings((), tokens=2, prompt_tokens=3, repeats=1, baselines=("llama.cpp",))
    _, rows, (note,) = bench.measure(
        tiny(), [3, 4, 5], settings, lambda session, sparsity: None,  # type: ignore[arg-type, return-value]
        lambda: Bandwidth(30e9, "a guess"), Silent(),
    )  # fmt: skip
    assert [row.label for row in rows] == ["dense"]
    assert note.startswith("no --baseline llama.cpp: ")
    assert note.endswith("failed with exit code 1: no")


def test_where_it_is_looked_for(
    stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="llama-bench is not on the PATH; TEAL_LLAMA_BENCH"):
        llama_cpp_decoding(tiny(), None, 6, 10, Silent())
    assert not (tmp_path / "home").exists()  # nothing was written for it
    program = stand_in()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TEAL_LLAMA_BENCH", str(program))
    assert llama_cpp.find() == str(program)
    monkeypatch.setenv("TEAL_LLAMA_BENCH", str(tmp_path / "nothing"))
    with pytest.raises(MissingError, match=r"TEAL_LLAMA_BENCH names .*nothing, which"):
        llama_cpp.find()


def test_a_program_that_is_none(stand_in: Any, tmp_path: Path) -> None:
    stand_in().write_bytes(b"\x00\x01no program")
    with pytest.raises(TealError, match="llama-bench cannot be run: "):
        decoding(tmp_path / "x.gguf").run()


def test_an_interruption_ends_it(stand_in: Any, tmp_path: Path) -> None:
    stand_in(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    code = (
        "import torch\nfrom pathlib import Path\n"
        "from teal_cli.benchmark.llama_cpp import LlamaCppDecoding\n"
        "LlamaCppDecoding(Path('x'), 1, 1, torch.device('cpu'), 1).run()\n"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert ours.poll() is None
        time.sleep(0.05)
    ours.send_signal(signal.SIGINT)
    ours.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("quantize", [None, "int8", "int8+head", "int4", "int4-128+head"])
@pytest.mark.parametrize("config", [WHOLE, TINY], ids=["blocks", "odd-rows"])
def test_the_file_has_our_shape_and_bits(
    quantize: str | None, config: ModelConfig, tmp_path: Path
) -> None:
    kind = QUANTIZATIONS[quantize] if quantize else None
    random_gguf.write(tmp_path / "x.gguf", config, torch.float16, kind)
    tensors = GgufTensors(tmp_path / "x.gguf")
    down = tensors.tensors["blk.0.ffn_down.weight"]
    wanted = "F16" if quantize is None or config.intermediate_size % 32 else (
        "Q4_0" if quantize.startswith("int4") else "Q8_0")  # fmt: skip
    assert down.kind.name == wanted
    assert tensors.shape("blk.0.ffn_down.weight") == (config.hidden_size, config.intermediate_size)
    assert ("output.weight" in tensors.tensors) is not config.tie_word_embeddings
    for name in tensors.tensors:
        values = tensors.read(name, torch.float32)
        assert values.isfinite().all()
        assert 0.001 < values.abs().mean() < 0.1


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    other = dataclasses.replace(WHOLE, model_type="phi3")
    with pytest.raises(UnsupportedError, match="writes no GGUF of this phi3"):
        random_gguf.write(tmp_path / "x.gguf", other, torch.float16, None)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_real_program(family: str, quantize: str | None) -> None:
    try:
        llama_cpp.find()
    except MissingError as error:
        pytest.skip(error.message)
    config = dataclasses.replace(
        WHOLE, model_type=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3"
    )
    theirs = llama_cpp_decoding(tiny(quantize, config), None, 4, 4, Silent())
    kind, _ = theirs.about()
    assert kind == {None: "F16", "int8": "Q8_0", "int4": "Q4_0"}[quantize]
    assert theirs.run().time_per_token_s > 0


def test_shapes_that_have_names_can_be_written() -> None:
    """But for the families whose GGUF has numbers of its own."""
    others = {"phi3", "granite", "smollm3", "ministral3"}
    assert {shape.model_type for shape in SHAPES.values()} - others <= set(
        random_gguf._ARCHITECTURES
    )
