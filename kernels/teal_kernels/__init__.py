"""Kernels of sparse decoding: a token's step in Triton and for a CPU, its specification in torch.

The package knows tensors and nothing of models, commands or files.
"""
