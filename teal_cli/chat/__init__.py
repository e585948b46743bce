"""The chat at a terminal: reading turns, slash commands, showing answers."""
