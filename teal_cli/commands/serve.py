"""`teal serve`: OpenAI's API on one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from teal_cli import console
from teal_cli.errors import UsageError
from teal_cli.options import (
    DEFAULT_CONTEXT,
    ContextOption,
    DeterministicOption,
    DeviceOption,
    DraftOption,
    DtypeOption,
    MethodOption,
    ModelArgument,
    OfflineOption,
    QuantizeOption,
    RevisionOption,
    SparsityOption,
    TemplateOption,
    TokenOption,
)

if TYPE_CHECKING:
    from teal_cli.sparsity.profile import Profile

HostOption = Annotated[
    str,
    typer.Option("--host", help="Address to listen at; one that others can reach needs a key."),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="TEAL_API_KEY",
        help="Key that every request must send; in TEAL_API_KEY it stays out of the shell's"
        " history. [default: none is asked for]",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="The model's name in requests. [default: as it is named here]"),
]
CorsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="Answer web pages of this origin, such as http://localhost:3000; '*' is all. Can be"
        " given several times. [default: none]",
    ),
]
MaxTokensOption = Annotated[
    int,
    typer.Option("--max-tokens", "-n", min=1, help="Longest answer where a request does not say."),
]
ThinkTokensOption = Annotated[
    int,
    typer.Option(
        "--think-tokens", min=1, help="Longest thinking, in tokens; then the answer begins."
    ),
]
QueueOption = Annotated[
    int,
    typer.Option("--queue", min=1, help="Requests that may wait; those beyond are told when."),
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout", min=1, help="Seconds from a request to the end of its answer, then it is cut."
    ),
]
DrainOption = Annotated[
    float,
    typer.Option("--drain", min=0, help="Seconds for the present answer to finish on SIGTERM."),
]
PrefixOption = Annotated[
    int,
    typer.Option(
        "--prefix-memory",
        min=0,
        help="Megabytes for the keys of the last conversations, beside the present one's.",
    ),
]


def serve(
    model: ModelArgument = None,
    sparsity: SparsityOption = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8642,
    api_key: ApiKeyOption = None,
    name: NameOption = None,
    cors: CorsOption = None,
    max_tokens: MaxTokensOption = 2048,
    think_tokens: ThinkTokensOption = 2048,
    context: ContextOption = None,
    queue: QueueOption = 64,
    timeout: TimeoutOption = 600.0,
    drain: DrainOption = 30.0,
    prefix_memory: PrefixOption = 1024,
    template: TemplateOption = None,
    method: MethodOption = None,
    draft: DraftOption = None,
    deterministic: DeterministicOption = False,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
) -> None:
    """Serve a model by OpenAI's API, sparsely; prints the address once it answers.

    Whatever is missing (the model, its conversion, its sparsity profile) is made first. Requests
    are answered one after another; each can have a sparsity of its own, by the field `sparsity` or
    the model's id: NAME, NAME:0.4, NAME:dense. With --draft the served default is dense. A line for
    each goes to stderr, without its words.
    SIGTERM and Ctrl-C let the present answer finish.
    """
    from teal_cli.serve.listening import bound, check_host, check_installed, listen

    check_installed()
    check_host(host, api_key)
    reporter = console.reporter()
    sock = bound(host, port)  # a port that is taken is told before a model is made

    from teal_cli import pipeline
    from teal_cli.drafts.names import Wanted
    from teal_cli.drafts.ready import prepare
    from teal_cli.inference.chat_template import ChatTemplate
    from teal_cli.inference.defaults import chat_defaults, left_out, sampling_defaults, stop_texts
    from teal_cli.inference.device import pick_device
    from teal_cli.inference.session import Session
    from teal_cli.serve.api import Limits, build
    from teal_cli.serve.engine import Engine
    from teal_cli.serve.model import Model, served_name
    from teal_cli.serve.server import run, server
    from teal_cli.sparsity import stored
    from teal_cli.store import models

    target_device = pick_device(device)
    ref = models.resolve(model, revision)
    wanted = None if draft is None else Wanted.parse(draft, sparsity).guessing_for(ref)
    quick = method in (None, "uniform")
    checkpoint = pipeline.ensure_checkpoint(
        ref,
        dtype=dtype,
        quantize=quantize,
        thresholds=None if sparsity == 0 or wanted else "quick" if quick else "best",
        device=device,
        token=token,
        offline=offline,
        reporter=reporter,
    )
    limit = checkpoint.config.context_length
    if context is not None and context > limit:
        raise UsageError(f"--context {context} is beyond this model's context of {limit} tokens")
    defaults, authors = chat_defaults(checkpoint.config), checkpoint.generation_defaults()
    if missing := left_out(authors):
        reporter.note(
            f"left out of the model's generation_config.json: {', '.join(missing)}; "
            "its author's answers may differ"
        )
    target = defaults.sparsity if sparsity is None else sparsity
    room = context or min(limit, DEFAULT_CONTEXT)
    guesser = None
    if wanted is not None:
        guesser = prepare(
            wanted,
            ref,
            checkpoint,
            sparsity,
            context=room,
            on=target_device,
            quick=quick,
            device=device,
            token=token,
            offline=offline,
            reporter=reporter,
        )
        target = 0.0
    if target > 0:
        profile: Profile | None = pipeline.ensure_profile(
            checkpoint, quick=quick, device=device, offline=offline, reporter=reporter
        )
    else:
        profile = stored.usable_or_built_in(checkpoint)
    tokenizer = checkpoint.tokenizer()
    served = Model(
        name=name or served_name(ref, model),
        fingerprint=checkpoint.fingerprint,
        tokenizer=tokenizer,
        template=ChatTemplate.of(tokenizer, template),
        eos_token_ids=checkpoint.eos_token_ids,
        stop_texts=stop_texts(authors),
        sampling=sampling_defaults(authors, defaults),
        sparsity=target,
        profile=profile,
        method=method,
        max_length=room,
        max_tokens=max_tokens,
        think_tokens=think_tokens,
        draft=None if wanted is None else wanted.name,
    )
    served.setting(target)  # a method that does not reach it is told now
    session = Session(
        checkpoint.load(target_device),
        max_length=served.max_length,
        deterministic=deterministic,
        reporter=reporter,
    )
    if guesser is not None:
        guesser.attach(session, guesser.setting(method), reporter=reporter)
    engine = Engine(
        served,
        session,
        most_waiting=queue,
        prefix_bytes=prefix_memory << 20,
        note=reporter.note,
    )
    app = build(engine, Limits(timeout), api_key=api_key, origins=cors or (), tell=reporter.note)
    reporter.note(f"serving {', '.join(served.ids)} on {target_device}; Ctrl-C ends it")
    console.print_line(listen(sock))
    run(server(app, engine, drain_s=drain), sock)
