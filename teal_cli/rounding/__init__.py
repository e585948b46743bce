"""Rounding weights to integers with regard for what they multiply."""
