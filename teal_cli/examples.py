"""What `--help` shows below the options: command lines to try, a command's most useful first."""

from __future__ import annotations

EXAMPLES = {
    "": (
        "teal chat",
        'teal chat demo "Name three rivers."',
        "teal bench demo",
        "teal help chat",
    ),
    "chat": (
        "teal chat",
        'teal chat demo "Name three rivers."',
        'cat notes.txt | teal chat llama3 -p "Summarise:"',
        "teal chat qwen3-8b --sparsity 40% --quantize int8",
        'teal chat ./my-model --json -p "Say hello." > answer.json',
    ),
    "serve": (
        "teal serve demo",
        "teal serve qwen3-8b --sparsity 40% --quantize int8",
        "TEAL_API_KEY=… teal serve llama3 --host 0.0.0.0",
    ),
    "bench": (
        "teal bench demo",
        "teal bench qwen3-8b --sparsity 0.4,0.5 --output speed.md",
        "teal bench llama-3-8b --random-weights",
    ),
    "eval": (
        "teal eval demo",
        "teal eval llama3 --sparsity 25%,40%,50% --plot quality.png",
        "teal eval demo --tasks arc_easy --limit 200",
    ),
    "calibrate": (
        "teal calibrate ./my-model --dataset notes.txt",
        "teal calibrate demo --method greedy",
        "teal calibrate --show --sparsity 0.4",
    ),
    "convert": (
        "teal convert llama3",
        "teal convert ./my-model.gguf --quantize int4 --dataset notes.txt",
    ),
    "export": (
        "teal export demo ./demo-sparse --sparsity 0.4",
        "teal export llama3 ./llama3-sparse --max-sequences 2",
    ),
    "download": (
        "teal download demo",
        "teal download Qwen/Qwen2.5-7B-Instruct --revision main",
    ),
    "models": (
        "teal models",
        "teal models --json",
        "teal models --remove llama3",
    ),
}


def epilog(command: str) -> str:
    """The examples as Click's help formatter keeps them: \\b keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])
