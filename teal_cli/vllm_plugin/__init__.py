"""vLLM's way to the thresholds of an exported model: the quantization method `teal`.

`register` is the package's entry point in `vllm.general_plugins`: vLLM calls it in each of its
processes, whatever model that serves.
"""

from __future__ import annotations

import logging

OLDEST, NEWEST = (0, 32), (0, 33)  # vLLM's versions: from the one, and before the other


def register() -> None:
    """Make the method known to vLLM; a second call changes nothing.

    A vLLM whose inner interface is another one goes on without it, and says so: other models
    than ours are none of its business.
    """
    try:
        from teal_cli.vllm_plugin import config  # noqa: F401 (registers itself once)
    except ImportError as error:
        logging.getLogger("vllm.teal").warning(
            "teal's exported models cannot be served by this vLLM (%s): teal knows %d.%d",
            error,
            *OLDEST,
        )
