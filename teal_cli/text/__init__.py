"""Text to calibrate on and to evaluate with: corpora, and windows of tokens cut from them."""
