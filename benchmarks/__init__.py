"""Benchmarks: `python -m benchmarks.cpu` on a CPU, `python -m benchmarks.gpu` on a GPU machine."""
