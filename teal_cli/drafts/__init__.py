"""What `--draft` names: read, found or made, and bound to a session."""
