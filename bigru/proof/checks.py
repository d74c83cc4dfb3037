"""Checks of a kernel by itself, against fp64: odd and ragged shapes, outputs NaN beforehand, twice to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels import reference
from bigru.kernels.config import Call, describe
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.recurrence import recurrent_gradients, states_before
from bigru.kernels.varlen import Varlen

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
NAMES = ("y", "h_n", "dgi", "dw_hh", "db_hn", "dh0")
"""What the recurrence gives: outputs and gradients."""
HIDDEN = (19, 100, 257)
"""Hidden sizes of the checks: padded a little and much, on chip and streamed, with units over."""
Optional = list[Tensor | None]


def error(actual: Tensor, expected: Tensor) -> float:
    """Returns the norm-relative error: infinite where `actual` is not finite, absolute where `expected` is zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not torch.isfinite(actual).all():
        return float("inf")
    norm = expected.norm()
    return float((actual - expected).norm() / (norm if norm > 0 else 1.0))


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    bias: bool = True,
    seed: int = 0,
    varlen: Varlen | None = None,
) -> tuple[Any, list[Tensor]]:
    """Makes inputs [gi, w_hh, b_hn, h0] and upstream gradients [dy, dh_n] for shape (T, B, H), rounded to `dtype`."""
    steps, batch, hidden = shape
    generator = torch.Generator().manual_seed(seed)
    rows = (steps, batch) if varlen is None else (int(varlen.batch_sizes.sum()),)

    def uniform(*size: int, bound: float) -> Tensor:
        return ((2 * torch.rand(*size, generator=generator) - 1) * bound).to(device, dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    bound = hidden**-0.5
    w_hh = uniform(2, 3 * hidden, hidden, bound=bound)
    b_hn = uniform(2, hidden, bound=bound) if bias else None
    inputs = [normal(*rows, 2, 3 * hidden), w_hh, b_hn, normal(2, batch, hidden)]
    return inputs, [normal(*rows, 2, hidden), normal(2, batch, hidden)]


def outputs_and_gradients(recurrence: Callable[..., Any], inputs: Optional, upstream: Sequence[Tensor]) -> Optional:
    """Returns all of `NAMES`, None where there is no bias."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y, h_n = recurrence(*leaves)
    torch.autograd.backward([y, h_n], upstream)
    return [y.detach(), h_n.detach(), *(None if x is None else x.grad for x in leaves)]


def expected(inputs: Optional, upstream: Sequence[Tensor], varlen: Varlen | None = None) -> Optional:
    """Returns all of `NAMES` as the fp64 reference has them on the same numbers, where they are."""
    wide = [None if x is None else x.double() for x in inputs]
    sizes = None if varlen is None else varlen.batch_sizes.tolist()

    def recurrence(gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gru_recurrence(gi, w_hh, b_hn, h0, sizes)

    return outputs_and_gradients(recurrence, wide, [x.double() for x in upstream])


def run_kernel(
    kernel: Kernel,
    inputs: Any,
    upstream: list[Tensor],
    precision: str = "fp32",
    config: Any = None,
    y: Tensor | None = None,
    gates: Tensor | None = None,
    varlen: Varlen | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns y, h_n and the gradients of a kernel itself, and its gates; all that it writes is NaN beforehand.

    Backward runs from y and gates if they are given.
    """
    gi, w_hh, b_hn, h0 = inputs

    def nan(*size: int) -> Tensor:
        return torch.full(size, torch.nan, dtype=gi.dtype, device=gi.device)

    rows, hidden = tuple(gi.shape[:-1]), h0.shape[2]
    call = Call(describe(gi.device), gi.dtype, hidden, precision, varlen is not None)
    config = config or kernel.choose(call, h0.shape[1])
    out = nan(*rows, hidden), nan(*h0.shape), nan(*kernel.gates_shape(rows, hidden))
    kernel.forward(Forward(gi, w_hh, b_hn, h0, out[0], out[1], out[2], varlen), config)
    y, gates = out[0] if y is None else y, out[2] if gates is None else gates
    dgi, dq, dh0 = nan(*gi.shape), nan(*y.shape), nan(*h0.shape)
    h_prev = None if varlen is None else nan(*y.shape)
    dy, dh_n = upstream
    kernel.backward(Backward(dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen, h_prev), config)
    before = states_before(y, h0) if h_prev is None else h_prev.transpose(0, 1)
    dw_hh, db_hn = recurrent_gradients(dgi, dq, before), dq.flatten(0, -3).sum(0)
    named = {"y": out[0], "h_n": out[1], "dgi": dgi, "dw_hh": dw_hh, "db_hn": db_hn, "dh0": dh0}
    return named, out[2]


def faults(
    kernel: Kernel, dtype: torch.dtype, precision: str, device: torch.device, hidden: Sequence[int] = HIDDEN
) -> Iterator[str]:
    """Yields what is wrong with a kernel at odd sizes, padded and ragged, those that it refuses left out."""
    ragged = Varlen(torch.tensor([9, 9, 7, 3, 1]), device)
    for size in hidden:
        for varlen in (None, ragged):
            if kernel.refusal(Call(describe(device), dtype, size, precision, varlen is not None)):
                continue
            inputs, upstream = make_inputs((5, 9, size), dtype, device, varlen=varlen)
            first, second = (run_kernel(kernel, inputs, upstream, precision, varlen=varlen)[0] for _ in range(2))
            where = f"H={size}{' ragged' if varlen else ''}"
            for name, wanted in zip(NAMES, expected(inputs, upstream, varlen), strict=True):
                assert wanted is not None
                # Written so that NaN is wrong.
                if not (found := error(first[name], wanted)) <= TOLERANCE[dtype, precision]:
                    yield f"{where}: error of {name} {found:.1e}"
                if not torch.equal(first[name], second[name]):
                    yield f"{where}: {name} differs from run to run"
