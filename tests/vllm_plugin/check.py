"""Exported models in the real vLLM, asked by the openai client, against transformers.

Run by `.ci/vllm` in an environment of its own: python tests/vllm_plugin/check.py FOLDER. Prints
what was measured; exits 1 where an answer is not what it should be.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from teal_kernels.tensors import RecoveryVectors
from torch import Tensor

PROMPTS = (
    "What is the capital of France?",
    "Name three rivers in Europe.",
    "Write a short story about a cat.",
    "What is 2+2?",
    "Tell me a joke.",
    "Who was Ada Lovelace?",
    "Explain gravity.",
    "List some fruits.",
)
# How far below the largest logit a chosen token's may lie: what bfloat16 rounds away of logits
# near 20, twice.
BFLOAT16_TIE = 0.25
# Of log probabilities in float32. Before a channel falls to the other side of its threshold they
# differ by less than 1e-4, and after it by some tenths.
FLOAT32_TIE = 0.01
# A channel that is as near as this to its threshold, relatively, may fall to either side.
CHANNEL_TIE = 1e-5
CLIENTS = (1, 2, 4, 8)


@contextmanager
def vllm(folder: Path, *options: str, ranks: int = 1) -> Iterator[Any]:
    """An openai client of a server that runs in the block."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["vllm", "serve", str(folder), "--served-model-name", "model", "--port", str(port)]
    command += ["--max-model-len", "512", *options]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if ranks > 1:
        # vLLM's own choice wants a memory node for each rank.
        cores = sorted(os.sched_getaffinity(0))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[:ranks]))
    log = (folder.parent / f"{folder.name}.log").open("w")
    began = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        while not is_up(port):
            if process.poll() is not None:
                raise SystemExit(f"vLLM did not start, see {log.name}")
            time.sleep(1)
        named = " ".join((folder.name, *command[9:]))
        print(f"{named}: up after {time.monotonic() - began:.0f} s", flush=True)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Oracle:
    """transformers on the same folder, thresholds and vectors on the answer's tokens."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        self._thresholds = None
        if found["thresholds"] is not None:
            self._thresholds = torch.tensor([*found["thresholds"].values()]).T
        self._vectors = exported_vectors(self._model, folder) if found["vectors"] else None

    def prompt(self, text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        start = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(start, add_special_tokens=False))

    def logits(self, prompt: list[int], answer: list[int], factor: float = 1.0) -> Tensor:
        """Of each place in the answer [tokens, vocab], with the thresholds times a factor."""
        from teal_cli.sparsified import put_thresholds

        if self._thresholds is not None:
            put_thresholds(
                self._model,
                self._thresholds * factor,
                sparse_from=len(prompt),
                vectors=self._vectors,
            )
        with torch.inference_mode():
            found: Tensor = self._model(torch.tensor([prompt + answer])).logits
        return found[0, len(prompt) - 1 : -1]


def exported_vectors(model: Any, folder: Path) -> RecoveryVectors:
    """Those of an exported folder, as `put_thresholds` takes them with transformers' model."""
    from teal_cli.vllm_plugin import vectors

    found = load_file(folder / vectors.FILE)

    def biases(*names: str) -> Tensor:
        return torch.cat([found[f"{name}_proj.bias"] for name in names], dim=1)

    def norms(name: str, site: str) -> Tensor:
        own = [layer.get_submodule(name).weight.detach() for layer in model.model.layers]
        return torch.stack(own) * found[f"{site}.factor"]

    return RecoveryVectors(
        qkv=biases("q", "k", "v"),
        o=biases("o"),
        gate_up=biases("gate", "up"),
        down=biases("down"),
        input_layernorm=norms("input_layernorm", "attn_in"),
        post_attention_layernorm=norms("post_attention_layernorm", "mlp_in"),
        norm=model.model.norm.weight.detach(),
    )


def ask(client: Any, prompt: list[int], tokens: int) -> tuple[list[int], Tensor]:
    """The likeliest answer's tokens and their log probabilities, as vLLM has them."""
    answer = client.completions.create(
        model="model",
        prompt=prompt,
        temperature=0,
        max_tokens=tokens,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    found = answer.choices[0].logprobs
    ids = [int(token.partition(":")[2]) for token in found.tokens]
    return ids, torch.tensor(found.token_logprobs, dtype=torch.float64)


def check_dense(client: Any, oracle: Oracle, tokens: int = 32) -> bool:
    """Whether every token is transformers' likeliest, up to ties of bfloat16."""
    right = True
    for text in PROMPTS:
        prompt = oracle.prompt(text)
        ids, _ = ask(client, prompt, tokens)
        logits = oracle.logits(prompt, ids)
        gaps = logits.max(-1).values - logits[range(len(ids)), ids]
        good = bool(gaps.max() <= BFLOAT16_TIE)
        right &= good
        print(f"  {'right' if good else 'WRONG'}: {len(ids)} tokens, {int((gaps > 0).sum())} of "
              f"them ties within {gaps.max():.3f}: {text}", flush=True)  # fmt: skip
    return right


def check_sparse(
    client: Any, oracle: Oracle, tokens: int, least: int, prompts: Sequence[str] = PROMPTS
) -> bool:
    """Whether answers are transformers' with the same thresholds, up to ties.

    One channel on the other side of its threshold changes what follows by as much as rounding to
    bfloat16 does: some tenths in a log probability, in transformers as well. So tokens are
    compared until the first difference, and that must come from such a tie.

    Args:
        client: of a server in float32.
        oracle: in float64.
        tokens: of an answer.
        least: how many sparse tokens must be equal before the first differences.
        prompts: what to ask.
    """
    right, equal = True, 0
    for text in prompts:
        prompt = oracle.prompt(text)
        ids, found = ask(client, prompt, tokens)
        exact = oracle.logits(prompt, ids).log_softmax(-1)
        other = [
            oracle.logits(prompt, ids, 1 + sign * CHANNEL_TIE).log_softmax(-1) for sign in (1, -1)
        ]
        own = exact[range(len(ids)), ids]
        off = torch.maximum((found - own).abs(), exact.max(-1).values - own) > FLOAT32_TIE
        ties = torch.stack([(each - exact).abs().amax(-1) for each in other]).amax(0) > FLOAT32_TIE
        first, tie = first_of(off), first_of(ties)
        good = first >= min(tie, len(ids))
        right &= good
        equal += max(first - 1, 0)  # the first token comes from the prompt, which is dense
        print(f"  {'right' if good else 'WRONG'}: {first} of {len(ids)} tokens equal, the first "
              f"tie of a channel at {tie}: {text}", flush=True)  # fmt: skip
    print(f"  {equal} sparse tokens equal before a difference, {least} needed")
    return right and equal >= least


def first_of(places: Tensor) -> int:
    """The first place that is true, or how many there are."""
    return int(places.int().argmax()) if bool(places.any()) else len(places)


def speeds(client: Any) -> dict[int, float]:
    """Tokens a second of all clients together, by their number."""

    def story(number: int) -> int:
        answer = client.completions.create(
            model="model",
            prompt=f"Story {number}: once upon a time",
            temperature=0,
            max_tokens=48,
            extra_body={"ignore_eos": True},
        )
        return int(answer.usage.completion_tokens)

    found = {}
    story(0)
    for clients in CLIENTS:
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(story, range(clients)))
        found[clients] = tokens / (time.monotonic() - began)
    return found


def check_bounds(folder: Path) -> bool:
    """Whether other versions of vLLM are refused with a sentence, and registering is harmless."""
    import vllm as engine

    from teal_cli.vllm_plugin.config import TealConfig
    from teal_cli.vllm_plugin.registration import register

    register()
    register()
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    TealConfig.from_config(content)
    right, known = True, engine.__version__
    for version in ("0.31.9", "0.33.0", "1.0"):
        engine.__version__ = version
        try:
            TealConfig.from_config(content)
            said = ""
        except RuntimeError as error:
            said = str(error)
        good = f"this vLLM, {version}, is not known" in said
        right &= good
        print(f"  {'right' if good else 'WRONG'}: vLLM {version}: {said}")
    engine.__version__ = known
    return right


def export_demo(folder: Path, sparsity: float) -> None:
    words = ["--sparsity", str(sparsity), "--max-sequences", str(max(CLIENTS))]
    command = ["teal", "export", "demo", str(folder), *words, "--dtype", "bfloat16"]
    subprocess.run(command, check=True)


def export_tiny(folder: Path) -> None:
    """A random Llama whose heads two ranks can share; the demo model's nine cannot be halved."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tiny

    from teal_cli.export import export
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.model.convert import convert
    from teal_cli.progress import Silent
    from teal_cli.sparsity.recovery import FIELDS, own_vectors
    from teal_cli.sparsity.setting import Setting
    from teal_cli.store import hub, models

    source = tiny.write_model(
        folder.parent / "tiny-source", hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )
    fetched = hub.fetch(models.resolve(str(source)), reporter=Silent())
    checkpoint = Checkpoint(convert(fetched, dtype="float32", reporter=Silent()))
    # Some 40 % of these inputs lie below, by site, and no two projections share a threshold.
    levels = torch.tensor([0.53, 0.54, 0.55, 0.4, 0.54, 0.56, 0.24]) + torch.arange(4)[:, None] / 99
    own = own_vectors(checkpoint.load())
    generator = torch.Generator().manual_seed(0)
    learnt = {  # all but the final norm, which is not exported
        name: getattr(own, name) + 0.2 * torch.randn(getattr(own, name).shape, generator=generator)
        for name in FIELDS
        if name != "norm"
    }
    setting = Setting("uniform", 0.4, levels, RecoveryVectors(**learnt, norm=own.norm))
    export(checkpoint, folder, setting, None, max_sequences=8, reporter=Silent())


def main(place: Path) -> int:
    place.mkdir(parents=True, exist_ok=True)
    dense, sparse, tiny = place / "demo-0", place / "demo-0.4", place / "tiny-0.4"
    export_demo(dense, 0.0)
    export_demo(sparse, 0.4)
    export_tiny(tiny)
    measured, right = {}, check_bounds(sparse)
    with vllm(dense) as client:
        right &= check_dense(client, Oracle(dense, torch.bfloat16))
        measured["0"] = speeds(client)
    with vllm(sparse) as client:
        measured["0.4"] = speeds(client)
    with vllm(sparse, "--dtype", "float32") as client:
        right &= check_sparse(client, Oracle(sparse, torch.float64), tokens=12, least=24)
    for way in ("--tensor-parallel-size", "--pipeline-parallel-size"):
        with vllm(tiny, "--dtype", "float32", way, "2", ranks=2) as client:
            oracle = Oracle(tiny, torch.float64)
            right &= check_sparse(client, oracle, tokens=24, least=48, prompts=PROMPTS[:4])
    print("clients " + "".join(f"{clients:8}" for clients in CLIENTS) + "   (tokens/s together)")
    for sparsity, found in measured.items():
        print(f"at {sparsity:<5}" + "".join(f"{found[clients]:8.1f}" for clients in CLIENTS))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
