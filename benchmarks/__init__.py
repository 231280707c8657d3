"""Benchmarks beyond ``fastwgan bench``: pytest-benchmark suites, the run for a GPU, and README's table and pictures."""
