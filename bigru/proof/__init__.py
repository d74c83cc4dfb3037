"""Proves kernels right and times them beside ATen's GRU: what `bigru.prove` and the benchmarks share."""
