"""What tests share: what `bigru.proof.checks` has, and a tracer's eyes."""

import os
import subprocess
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigru.proof.checks import NAMES, TOLERANCE, error, expected, make_inputs, outputs_and_gradients, run_kernel

__all__ = ["NAMES", "TOLERANCE", "error", "expected", "make_inputs", "outputs_and_gradients", "run_kernel"]

MODES = dict(zip(("fp32", "tf32", "bf16", "fp16"), TOLERANCE, strict=True))
"""Storage dtype and precision by the names that users know."""


def named(results):
    """Outputs and gradients of a recurrence by name."""
    return dict(zip(NAMES, results, strict=True))


def near(actual, wanted, tolerance):
    """Asserts that results, by name or in order, are those wanted."""
    if not isinstance(actual, dict):
        actual, wanted = dict(enumerate(actual)), dict(enumerate(wanted))
    assert actual.keys() == wanted.keys()
    for name, value in actual.items():
        assert (value is None) == (wanted[name] is None), name
        assert value is None or error(value, wanted[name]) < tolerance, name


def same(ours, theirs, tolerance=1e-6):
    """Returns whether results in order agree."""
    return all(error(a, b) < tolerance for a, b in zip(ours, theirs, strict=True))


def trained(gru, x, hx=None, run=None):
    """Outputs, and the gradients of the input and of every parameter, of a module or of what runs it."""
    gru.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    run = gru if run is None else run
    y, h_n = run(x) if hx is None else run(x, hx)
    torch.autograd.backward((y, h_n), (torch.cos(y.detach()), torch.sin(h_n.detach())))
    return [y, h_n, x.grad, *(parameter.grad for parameter in gru.parameters())]


def assert_near(results, inputs, upstream, tolerance):
    """Asserts that outputs and gradients by name are the fp64 reference's, in the inputs' dtype."""
    near(results, named(expected(inputs, upstream)), tolerance)
    assert all(value is None or value.dtype == inputs[0].dtype for value in results.values())


def matches_reference(run, inputs, upstream, tolerance):
    """Asserts that a recurrence gives what the fp64 reference does."""
    assert_near(named(outputs_and_gradients(run, inputs, upstream)), inputs, upstream, tolerance)


def opcheck(kernel, device, bias=True):
    """Has torch check the operators of a kernel, forward and backward."""
    inputs, (dy, dh_n) = make_inputs((2, 3, 4), torch.float32, device, bias=bias)
    y, _, gates = torch.ops.bigru.gru_forward(*inputs, "fp32", True, kernel)
    backward = dy, dh_n, y, gates, inputs[3], inputs[1], "fp32", kernel
    torch.library.opcheck(torch.ops.bigru.gru_backward.default, backward)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.bigru.gru_forward.default, (*inputs, "fp32", True, kernel))


def compiled_apart(code, folder):
    """What code that compiles kernels prints, in a process of its own: in this one they may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Recorder(TorchDispatchMode):
    """Records the operators that run: to a layer it looks like a compiler or a tracer."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))
