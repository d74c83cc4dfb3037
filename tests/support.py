"""What tests and benchmarks share: the tolerance table, the error measure, and the recurrence's inputs and truth."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bigru.kernels import reference
from bigru.kernels.config import Call, describe
from bigru.kernels.kernel import Backward, Forward

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


MODES = dict(zip(("fp32", "tf32", "bf16", "fp16"), TOLERANCE, strict=True))
"""Storage dtype and precision by the names that users know."""


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm-relative error; infinite where `actual` is not finite, absolute where `expected` is zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not torch.isfinite(actual).all():
        return float("inf")
    norm = expected.norm()
    return ((actual - expected).norm() / (norm if norm > 0 else 1.0)).item()


NAMES = ("y", "h_n", "dgi", "dw_hh", "db_hn", "dh0")
"""What the recurrence gives: outputs and gradients."""


def make_inputs(shape, dtype, device, *, bias=True, seed=0):
    """Inputs (gi, w_hh, b_hn, h0) and upstream gradients (dy, dh_n) for shape (T, B, H), rounded to `dtype`."""
    steps, batch, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size, bound):
        return ((2 * torch.rand(*size, generator=generator) - 1) * bound).to(device, dtype)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(device, dtype)

    bound = hidden**-0.5
    w_hh = uniform(2, 3 * hidden, hidden, bound=bound)
    b_hn = uniform(2, hidden, bound=bound) if bias else None
    inputs = [normal(steps, batch, 2, 3 * hidden), w_hh, b_hn, normal(2, batch, hidden)]
    return inputs, [normal(steps, batch, 2, hidden), normal(2, batch, hidden)]


def outputs_and_gradients(recurrence, inputs, upstream):
    """All of `NAMES`, None where there is no bias."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    y, h_n = recurrence(*leaves)
    torch.autograd.backward([y, h_n], upstream)
    return [y.detach(), h_n.detach(), *(None if x is None else x.grad for x in leaves)]


def expected(inputs, upstream):
    """The fp64 reference on the same numbers, where they are."""
    wide = [None if x is None else x.double() for x in inputs]
    return outputs_and_gradients(reference.gru_recurrence, wide, [x.double() for x in upstream])


def matches_reference(run, inputs, upstream, tolerance):
    """Asserts that outputs and gradients of a recurrence are the fp64 reference's, in the inputs' dtype."""
    results = zip(NAMES, outputs_and_gradients(run, inputs, upstream), expected(inputs, upstream), strict=True)
    for name, value, wanted in results:
        assert (value is None) == (wanted is None), name
        if value is not None:
            assert value.dtype == inputs[0].dtype, name
            assert error(value, wanted) < tolerance, name


def opcheck(kernel, device, bias=True):
    """Has torch check the operators of a kernel, forward and backward."""
    inputs, (dy, dh_n) = make_inputs((2, 3, 4), torch.float32, device, bias=bias)
    y, _, gates = torch.ops.bigru.gru_forward(*inputs, "fp32", True, kernel)
    backward = dy, dh_n, y, gates, inputs[3], inputs[1], "fp32", kernel
    torch.library.opcheck(torch.ops.bigru.gru_backward.default, backward)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.bigru.gru_forward.default, (*inputs, "fp32", True, kernel))


class Recorder(TorchDispatchMode):
    """Records the operators that run: to a layer it looks like a compiler or a tracer."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def run_kernel(kernel, inputs, upstream, precision="fp32", config=None, y=None, gates=None):
    """y, h_n, dgi, dh0 and db_hn of a kernel itself, and its gates; backward from y and gates if they are given."""
    gi, w_hh, _, h0 = inputs
    call = Call(describe(gi.device), gi.dtype, h0.shape[2], precision)
    rows, hidden = gi.shape[:3], h0.shape[2]
    results = gi.new_empty(*rows, hidden), torch.empty_like(h0), gi.new_empty(kernel.gates_shape(rows, hidden))
    config = config or kernel.choose(call, h0.shape[1])
    kernel.forward(Forward(*inputs, *results), config)
    y, gates = results[0] if y is None else y, results[2] if gates is None else gates
    dgi, dq, dh0 = torch.empty_like(gi), torch.empty_like(y), torch.empty_like(h0)
    kernel.backward(Backward(*upstream, y, gates, h0, w_hh, dgi, dq, dh0), config)
    named = {"y": results[0], "h_n": results[1], "dgi": dgi, "dh0": dh0, "db_hn": dq.sum((0, 1))}
    return named, results[2]
