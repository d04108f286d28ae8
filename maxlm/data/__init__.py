"""Text to tokens to batches: sources → build → store → loader, each a module.

Nothing here imports jax, so that the worker processes of a build start fast.
"""
