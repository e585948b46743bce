"""Which versions of vLLM the plug-in is made for; the extra `vllm` names the same."""

OLDEST, NEWEST = (0, 32), (0, 33)  # from the one, and before the other


def known() -> str:
    """The versions in words."""
    return f"from {OLDEST[0]}.{OLDEST[1]} to before {NEWEST[0]}.{NEWEST[1]}"
