"""The exported demo model in the real vLLM, asked by the openai client, against transformers.

Run by `.ci/vllm` in an environment of its own: python tests/vllm/check.py FOLDER. Prints what was
measured; exits 1 where an answer is not what it should be.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PROMPTS = (
    "What is the capital of France?",
    "Name three rivers in Europe.",
    "Write a short story about a cat.",
)
TOKENS = 32
# How far below the largest logit a chosen token's may lie: what bfloat16 rounds away of logits
# near 20, twice.
TIE = 0.25
CLIENTS = (1, 2, 4, 8)


@contextmanager
def vllm(folder: Path, *options: str) -> Iterator[Any]:
    """An openai client of a server that runs in the block."""
    import openai

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["vllm", "serve", str(folder), "--served-model-name", "demo", "--port", str(port)]
    command += ["--max-model-len", "1024", *options]
    # Ranks that share one memory node cannot be bound to cores of their own.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if options else {}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
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
        print(f"{folder.name} {' '.join(options)}: up after {time.monotonic() - began:.0f} s")
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
    """transformers on the same folder, with the config's thresholds on the answer's tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        found = json.loads((folder / "config.json").read_text())["quantization_config"]
        self._thresholds = None
        if found["thresholds"] is not None:
            self._thresholds = torch.tensor([*found["thresholds"].values()]).T

    def gaps(self, prompt: str, text: str) -> list[float]:
        """How far each token of an answer lies below the likeliest in its place."""
        from teal_cli.sparsified import put_thresholds

        turn = [{"role": "user", "content": prompt}]
        start = self._tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        before = self._tokenizer.encode(start, add_special_tokens=False)
        answer = self._tokenizer.encode(text, add_special_tokens=False)
        if self._thresholds is not None:
            put_thresholds(self._model, self._thresholds, sparse_from=len(before))
        with torch.inference_mode():
            logits = self._model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        chosen = logits[range(len(answer)), answer]
        return [float(gap) for gap in logits.max(-1).values - chosen]


def check(client: Any, oracle: Oracle, name: str) -> bool:
    """Ask every prompt; whether each answer is the oracle's, up to ties."""
    right = True
    for prompt in PROMPTS:
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=TOKENS,
        )
        text = answer.choices[0].message.content
        gaps = oracle.gaps(prompt, text)
        good = max(gaps) <= TIE
        right &= good
        ties = sum(gap > 0 for gap in gaps)
        print(f"  {name}: {'right' if good else 'WRONG'}, {len(gaps)} tokens, {ties} of them ties "
              f"within {max(gaps):.3f}: {text[:60]!r}")  # fmt: skip
    return right


def speeds(client: Any) -> dict[int, float]:
    """Tokens a second of all clients together, by their number."""

    def ask(number: int) -> int:
        answer = client.completions.create(
            model="demo",
            prompt=f"Story {number}: once upon a time",
            temperature=0,
            max_tokens=48,
            extra_body={"ignore_eos": True},
        )
        return int(answer.usage.completion_tokens)

    found = {}
    for clients in CLIENTS:
        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            tokens = sum(pool.map(ask, range(clients)))
        found[clients] = tokens / (time.monotonic() - began)
    return found


def main(place: Path) -> int:
    place.mkdir(parents=True, exist_ok=True)
    folders = {0.0: place / "demo-0", 0.4: place / "demo-0.4"}
    for sparsity, folder in folders.items():
        if not folder.exists():
            words = ["--sparsity", str(sparsity), "--max-sequences", str(max(CLIENTS))]
            words += ["--dtype", "bfloat16"]
            subprocess.run(["teal", "export", "demo", str(folder), *words], check=True)
    oracles = {sparsity: Oracle(folder) for sparsity, folder in folders.items()}
    right, measured = True, {}
    for sparsity, folder in folders.items():
        with vllm(folder) as client:
            right &= check(client, oracles[sparsity], f"at {sparsity:g}")
            measured[sparsity] = speeds(client)
    # The demo model's nine heads can be divided by three, not by two.
    with vllm(folders[0.4], "--tensor-parallel-size", "3") as client:
        right &= check(client, oracles[0.4], "at 0.4 on three ranks")
    print("clients " + "".join(f"{clients:8}" for clients in CLIENTS) + "   (tokens/s together)")
    for sparsity, found in measured.items():
        print(f"at {sparsity:<5g}" + "".join(f"{found[clients]:8.1f}" for clients in CLIENTS))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
