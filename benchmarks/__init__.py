"""Benchmarks: `python -m pytest benchmarks` compares with nn.GRU; `python -m benchmarks.gpu` is for a GPU machine."""
