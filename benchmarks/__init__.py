"""Benchmarks: each figure stands beside its peer or its limit, which the same run measures."""
