"""teal: training-free activation sparsity for local large language models."""

__version__ = "0.1.0"
