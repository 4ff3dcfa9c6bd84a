"""A folder per operation: reference.py in plain PyTorch, triton.py, and one dispatch."""
