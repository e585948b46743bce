"""Decoding: a session that holds one sequence, sampling, the generation loop, chat."""
