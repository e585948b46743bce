"""The model: its config, its checkpoint, the decoder and its cache."""
