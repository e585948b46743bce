"""`teal chat`: talk to a model, in a loop or once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from teal_cli import console, process
from teal_cli.chat.prompt import only_prompt
from teal_cli.errors import UsageError
from teal_cli.options import (
    DEFAULT_CONTEXT,
    ContextOption,
    DeterministicOption,
    DeviceOption,
    DraftOption,
    DtypeOption,
    JsonOption,
    MethodOption,
    ModelArgument,
    NoRecoverOption,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    SparsityOption,
    TemplateOption,
    ThreadsOption,
    TokenOption,
)

if TYPE_CHECKING:
    from teal_cli.inference.conversation import Conversation
    from teal_cli.inference.sampling import Sampling
    from teal_cli.model.checkpoint import Checkpoint
    from teal_cli.sparsity.profile import Profile

WordsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Answer this and leave, as with --prompt; several words need no quotes.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="Answer this and leave. Text from a pipe follows it after an empty line; alone it is"
        " the prompt, as it is with '-'.",
    ),
]
HistoryOption = Annotated[
    bool,
    typer.Option(
        "--history",
        envvar="TEAL_HISTORY",
        help="Keep the prompts that are typed for later chats, in chat-history.jsonl in the user"
        " state folder. TEAL_HISTORY=1 says so for all chats. [default: they are not kept]",
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
        " [default: the model's own, else 0.7; 0 below a billion weights]",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        help="Choose among the K likeliest tokens; 0 or -1 is all."
        " [default: the model's own, else 0]",
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
MinPOption = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Choose among the tokens with at least this share of the likeliest one's"
        " probability; 0 is all. [default: the model's own, else 0]",
    ),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Make tokens that the conversation has already less likely; 1 is no penalty."
        " [default: the model's own, else 1]",
    ),
]
AnswerSeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Makes the answer repeatable. [default: a new one]"),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")
]
OverflowOption = Annotated[
    Literal["truncate", "stop"],
    typer.Option(
        "--overflow",
        help="Once the conversation fills the context: 'truncate' leaves out the oldest turns,"
        " 'stop' takes no more.",
    ),
]
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="Answer twice, dense and sparse, and say where they part."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End an answer before this text; can be given several times."),
]
ThinkOption = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Think before answering (or not, with --no-think), where the model has a switch."
        " [default: as its chat template has it]",
    ),
]
ThinkTokensOption = Annotated[
    int,
    typer.Option(
        "--think-tokens", min=1, help="Longest thinking, in tokens; then the answer begins."
    ),
]
PlainOption = Annotated[
    bool,
    typer.Option("--plain", help="Show answers as they come, without rendering their Markdown."),
]


def chat(
    model: ModelArgument = None,
    words: WordsArgument = None,
    sparsity: SparsityOption = None,
    prompt: PromptOption = None,
    system: SystemOption = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: AnswerSeedOption = None,
    max_tokens: MaxTokensOption = 512,
    stop: StopOption = None,
    think: ThinkOption = None,
    think_tokens: ThinkTokensOption = 2048,
    template: TemplateOption = None,
    context: ContextOption = None,
    overflow: OverflowOption = "truncate",
    compare: CompareOption = False,
    draft: DraftOption = None,
    plain: PlainOption = False,
    history: HistoryOption = False,
    method: MethodOption = None,
    no_recover: NoRecoverOption = False,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Talk to a model, sparsely; with a prompt or piped text, answer once.

    Whatever is missing (the model, its conversion, its sparsity profile) is made first. The
    answer goes to stdout, all else to stderr. Ctrl-C ends an answer and keeps what was said;
    /help lists what can be typed besides prompts.
    """
    text = only_prompt(prompt, words)
    if json and text is None:
        raise UsageError("--json answers once: it needs a prompt", hint="Give one with --prompt.")
    if json and compare:
        raise UsageError("--json takes one answer, --compare makes two: leave one out")
    if compare and sparsity == 0:
        raise UsageError("--compare needs a sparsity above 0")
    if compare and draft is not None:
        raise UsageError("--draft gives the dense model's answer: there is nothing to --compare")
    if stop and not all(stop):
        raise UsageError("--stop needs a text")
    reporter = console.reporter()

    with process.uncollected():
        from teal_cli import pipeline
        from teal_cli.chat.answers import answer, document
        from teal_cli.chat.loop import talk
        from teal_cli.chat.state import Chat
        from teal_cli.drafts.names import Wanted
        from teal_cli.drafts.ready import prepare
        from teal_cli.inference.defaults import (
            chat_defaults,
            left_out,
            sampling_defaults,
            stop_texts,
        )
        from teal_cli.inference.device import pick_device
        from teal_cli.inference.sampling import Sampling
        from teal_cli.inference.session import Session
        from teal_cli.store import models, paths
        from teal_cli.threads import use_threads

    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    Sampling(**given)  # refuse a bad value before anything is downloaded
    target_device = pick_device(device)
    use_threads(threads)
    ref = models.resolve(model, revision)
    wanted = None if draft is None else Wanted.parse(draft, sparsity).guessing_for(ref)
    where: Any = {"device": device, "token": token, "offline": offline, "reporter": reporter}
    quick = method in (None, "uniform")  # an answer first; another method takes a calibration
    checkpoint = pipeline.ensure_checkpoint(
        ref,
        dtype=dtype,
        quantize=quantize,
        thresholds=None if sparsity == 0 or wanted else "quick" if quick else "best",
        **where,
    )
    limit = checkpoint.config.context_length
    if context is not None and context > limit:  # told before a profile is made
        raise UsageError(f"--context {context} is beyond this model's context of {limit} tokens")

    defaults, stored = chat_defaults(checkpoint.config), checkpoint.generation_defaults()
    sampling = Sampling(**(sampling_defaults(stored, defaults, given) | given), seed=seed)
    stop = stop_texts(stored) if stop is None else stop
    if missing := left_out(stored):
        reporter.note(
            f"left out of the model's generation_config.json: {', '.join(missing)}; "
            "its author's answers may differ"
        )

    @cache
    def profile() -> Profile:
        return pipeline.ensure_profile(
            checkpoint, quick=quick, device=device, offline=offline, reporter=reporter
        )

    with process.uncollected():
        converse = _conversation(checkpoint, sampling, template, think)
    target = defaults.sparsity if sparsity is None else sparsity
    room = context or min(limit, DEFAULT_CONTEXT)
    guesser = None
    if wanted is not None:
        guesser = prepare(
            wanted, ref, checkpoint, sparsity, context=room, on=target_device, quick=quick, **where
        )
    elif target > 0:
        profile()  # made before the weights take up memory
    with process.uncollected():
        session = Session(
            checkpoint.load(target_device),
            max_length=room,
            deterministic=deterministic,
            reporter=reporter,
        )
        if guesser is not None:
            setting = guesser.setting(method, recover=not no_recover)
            guesser.attach(session, setting, reporter=reporter)
    chat = Chat(
        model=checkpoint.name,
        weights=checkpoint.folder.name,
        session=session,
        conversation=converse(session, stop_texts=stop, system=system, overflow=overflow),
        profile=guesser.profile if guesser else profile,
        method=method,
        recover=not no_recover,
        max_tokens=max_tokens,
        think_tokens=think_tokens,
        compare=compare,
        plain=plain or not console.is_rich(sys.stdout),
        silent=json,
    )
    if guesser is None:
        chat.set_sparsity(target)
    if text is None:
        talk(chat, paths.state_dir() / "chat-history.jsonl" if history else None)
        return
    said = answer(chat, text)
    if json:
        console.print_json(document(chat, said))
    if said.finish.reason == "interrupted":
        raise typer.Exit(130)


def _conversation(
    checkpoint: Checkpoint,
    sampling: Sampling,
    template_name: str | None,
    think: bool | None,
) -> Callable[..., Conversation]:
    """Makes a conversation with a model.

    What a checkpoint's files say is checked here, before its weights take up time and memory.
    """
    from teal_cli.inference.chat_template import ChatTemplate, check_think
    from teal_cli.inference.conversation import Conversation
    from teal_cli.inference.ends import stop_token_ids
    from teal_cli.inference.sampling import Sampler

    tokenizer = checkpoint.tokenizer()
    template = ChatTemplate.of(tokenizer, template_name)
    check_think(template, think)
    return partial(
        Conversation,
        tokenizer=tokenizer,
        sampler=Sampler(sampling),
        stop_token_ids=stop_token_ids(checkpoint.eos_token_ids, tokenizer, template),
        template=template,
        think=think,
    )
