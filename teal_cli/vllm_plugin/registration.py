"""The package's entry point in `vllm.general_plugins`."""

from __future__ import annotations

import logging

from teal_cli.vllm_plugin.versions import known


def register() -> None:
    """Make the method known to vLLM, which calls this in each process, whatever model it serves.

    A second call changes nothing. A vLLM whose inner interface is another one goes on without the
    method, and is told so: other models than ours are none of our business.
    """
    try:
        from teal_cli.vllm_plugin import config  # noqa: F401 (registers itself once)
    except ImportError as error:
        logging.getLogger("vllm.teal").warning(
            "teal's exported models cannot be served by this vLLM (%s): teal knows those %s",
            error,
            known(),
        )
