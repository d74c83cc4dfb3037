"""What several rooms' tests share: the tolerance table and the error measure."""

import torch
from torch import Tensor

# Norm-relative error against the fp64 reference, by storage dtype and precision. Loosening a row is a changelog line.
TOLERANCE = {
    # Products of two 22-bit factors (fp16x3) or TF32x3, fp32 sums: measured 1e-7; the bound is what users are promised.
    (torch.float32, "fp32"): 1e-5,
    # 11 bits of mantissa in each factor of every product: 5e-4 a factor, averaged down by the sums over H.
    (torch.float32, "tf32"): 2e-3,
    # 8 bits of mantissa in everything stored: inputs, states, gates and gradients.
    (torch.bfloat16, "fp32"): 2e-2,
    # 11 bits in everything stored; gradients may come near its smallest numbers, so the bound is bf16's.
    (torch.float16, "fp32"): 2e-2,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm-relative error; infinite where `actual` is not finite, absolute where `expected` is zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not torch.isfinite(actual).all():
        return float("inf")
    norm = expected.norm()
    return ((actual - expected).norm() / (norm if norm > 0 else 1.0)).item()
