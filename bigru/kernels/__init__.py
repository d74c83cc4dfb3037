"""The bidirectional GRU recurrence: reference, Triton kernels, custom operators and the `BiGRU` module."""
