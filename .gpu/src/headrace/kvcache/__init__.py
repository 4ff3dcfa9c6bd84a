"""Blocks, prefix index, account; pool.py is the only file with tensors."""
