"""How good a sparse model still is: perplexity and divergence from the dense one."""
