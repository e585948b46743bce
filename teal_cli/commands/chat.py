"""`teal chat`: talk to a model, in a loop or once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    DeterministicOption,
    DeviceOption,
    DtypeOption,
    MethodOption,
    ModelArgument,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    TokenOption,
    check_sparsity,
)

if TYPE_CHECKING:
    from teal_cli.inference.chat import Conversation
    from teal_cli.inference.generate import Finish

# Room for the conversation where --context does not say: 1 GB of cache at Llama-3-8B's shape.
_DEFAULT_CONTEXT = 8192


SparsityOption = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        "-s",
        help="Share of the projections' inputs to skip, from 0 (exact) to below 1."
        " [default: 0.4; 0.25 below a billion weights]",
        callback=check_sparsity,
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="Answer this and leave; '-' reads it from stdin, as a pipe into teal does.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System message before the first turn.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="Randomness of the answer; 0 always takes the likeliest token."
        " [default: the model's own, else 0.7; 0.2 below a billion weights]",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        help="Choose among the K likeliest tokens; 0 is all. [default: the model's own, else 0]",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Choose among the likeliest tokens whose probabilities sum to P."
        " [default: the model's own, else 0.9]",
    ),
]
AnswerSeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Makes the answer repeatable. [default: a new one]"),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens that the conversation may hold."
        f" [default: the model's, at most {_DEFAULT_CONTEXT}]",
    ),
]


def chat(
    model: ModelArgument = None,
    sparsity: SparsityOption = None,
    prompt: PromptOption = None,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: AnswerSeedOption = None,
    max_tokens: MaxTokensOption = 512,
    context: ContextOption = None,
    method: MethodOption = None,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
) -> None:
    """Talk to a model, sparsely; with --prompt or piped text, answer once.

    Whatever is missing (the model, its conversion, its sparsity profile) is made first. The
    answer goes to stdout, all else to stderr. Ctrl-C ends an answer and keeps what was said.
    """
    text = _one_shot_prompt(prompt)
    reporter = console.reporter()

    from teal_cli import pipeline
    from teal_cli.inference.chat import Conversation, chat_defaults, sampling_defaults
    from teal_cli.inference.device import pick_device
    from teal_cli.inference.sampling import Sampler, Sampling
    from teal_cli.inference.session import Session
    from teal_cli.store import models

    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    Sampling(**given)  # refuse a bad value before anything is downloaded
    target_device = pick_device(device)
    checkpoint = pipeline.ensure_checkpoint(
        models.resolve(model, revision),
        dtype=dtype,
        quantize=quantize,
        device=device,
        token=token,
        offline=offline,
        reporter=reporter,
    )
    defaults = chat_defaults(checkpoint.config)
    target = defaults.sparsity if sparsity is None else sparsity
    thresholds = None
    if target > 0:
        profile = pipeline.ensure_profile(
            checkpoint, device=device, offline=offline, reporter=reporter
        )
        thresholds = profile.thresholds(target, method)
    session = Session(
        checkpoint.load(target_device),
        max_length=context or min(checkpoint.config.max_position_embeddings, _DEFAULT_CONTEXT),
        deterministic=deterministic,
        reporter=reporter,
    )
    session.set_thresholds(thresholds, target)
    tokenizer = checkpoint.tokenizer()
    # Some configs leave out the token that ends a turn, and their tokenizer knows it.
    stops = {*checkpoint.eos_token_ids, tokenizer.eos_token_id} - {None}
    chosen = sampling_defaults(checkpoint.generation_defaults(), defaults) | given
    conversation = Conversation(
        session,
        tokenizer,
        Sampler(Sampling(**chosen, seed=seed)),
        stop_token_ids=stops,
        system=system,
    )

    def answer(turn: str) -> str:
        return _answer(
            conversation, turn, max_tokens, lambda f: _statistics(f, target, session.backend)
        )

    if text is None:
        _loop(conversation.has_template, answer)
    elif answer(text) == "interrupted":
        raise KeyboardInterrupt


def _loop(has_template: bool, answer: Callable[[str], str]) -> None:
    """Answer turn after turn until the user leaves."""
    console.print_dim("Ctrl-C ends an answer, Ctrl-D leaves.")
    if not has_template:
        console.print_dim("This model has no chat template: it continues what you write.")
    while (line := _read_turn()) is not None:
        if line.strip():
            answer(line)


def _one_shot_prompt(prompt: str | None) -> str | None:
    """The only prompt, from the option or a pipe; None where a person sits at a terminal."""
    if prompt is None and sys.stdin.isatty():
        return None
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"the text on stdin is not UTF-8: {error}") from None
    if not prompt.strip():
        raise UsageError("the prompt is empty", hint="Give a text with --prompt or through a pipe.")
    return prompt


def _read_turn() -> str | None:
    """One line from the terminal; None when the user leaves."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() line editing and history)
    try:
        if sys.stdout.isatty():
            return input(">>> ")
        print(">>> ", end="", file=sys.stderr, flush=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _answer(
    conversation: Conversation, prompt: str, max_tokens: int, describe: Callable[[Finish], str]
) -> str:
    """Stream one answer to stdout and its cost to stderr; return why it ended."""
    from teal_cli.inference.chat import Text

    reason = ""
    with _interrupt_flag() as interrupted:
        for step in conversation.answer(prompt, max_new_tokens=max_tokens, interrupted=interrupted):
            if isinstance(step, Text):
                print(step.text, end="", flush=True)
            else:
                print(flush=True)
                console.print_dim(describe(step))
                reason = step.reason
    return reason


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is asked for; a second one interrupts as usual."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _statistics(finish: Finish, target: float, backend: str) -> str:
    stats = finish.stats
    parts = [f"{stats.new_tokens} token{'' if stats.new_tokens == 1 else 's'}"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    parts.append(f"first token after {stats.time_to_first_token_s:.2f} s")
    if target == 0:
        parts.append("dense")
    elif stats.realised_sparsity is None:
        parts.append(f"sparsity {target:.0%}")
    else:
        parts.append(f"sparsity {target:.0%}, realised {stats.realised_sparsity:.1%}")
    parts.append(backend)
    ending = {
        "length": "cut off by --max-tokens",
        "context": "the context is full",
        "interrupted": "stopped",
    }.get(finish.reason)
    if ending:
        parts.append(ending)
    return " · ".join(parts)
