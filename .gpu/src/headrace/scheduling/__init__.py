"""Who runs next: budget, policy, step. Plain Python over plain data."""
