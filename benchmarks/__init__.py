"""Measurements that print JSON lines; `--record` appends them to results/."""
