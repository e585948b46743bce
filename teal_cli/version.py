"""The version, on its own: whoever writes a file says it, and imports nothing for it."""

__version__ = "0.1.0"
