"""Measurements that print JSON; see docs/benchmarks.md."""
