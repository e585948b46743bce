"""A server of OpenAI's API on one model: `teal serve`."""
