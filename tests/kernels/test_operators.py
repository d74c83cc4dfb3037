"""The operators: the loops in PyTorch and in C behind them, what they keep for a backward pass, what they refuse."""

import functools

import pytest
import torch
from support import TOLERANCE, Recorder, expected, make_inputs, matches_reference, near, opcheck, outputs_and_gradients

from bigru.kernels.cpu import KERNEL
from bigru.kernels.recurrence import fused_gru_recurrence

FORWARD = torch.ops.bigru.gru_forward.default
needs_cpu = pytest.mark.skipif(KERNEL.instructions == "none", reason="the C extension is not built")
CPU = pytest.param("cpu", marks=needs_cpu)
LOOPS = [("scan", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
LOOPS += [pytest.param("cpu", dtype, marks=needs_cpu) for dtype in (torch.float64, torch.float32)]


@pytest.fixture
def device(kernel, kernel_device):
    """Where a kernel runs."""
    if kernel == "triton":
        pytest.importorskip("triton")
        return kernel_device
    return torch.device("cpu")


def recurrence(kernel):
    return functools.partial(fused_gru_recurrence, precision="fp32", kernel=kernel)


every_kernel = pytest.mark.parametrize("kernel", ["triton", "scan", CPU])
in_triton = pytest.mark.parametrize("kernel", ["triton"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (4, 1, 5), (5, 3, 7), (4, 9, 20)], ids=str)
@pytest.mark.parametrize(("kernel", "dtype"), LOOPS, ids=str)
def test_a_loop_matches_the_reference(kernel, dtype, shape, bias, poisoned):
    inputs, upstream = make_inputs(shape, dtype, "cpu", bias=bias)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype) or TOLERANCE[dtype, "fp32"]
    matches_reference(recurrence(kernel), inputs, upstream, tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [pytest.param("triton", marks=pytest.mark.slow), "scan", CPU])
def test_opcheck(kernel, bias, device):
    opcheck(kernel, device, bias)


@every_kernel
def test_empty_batch(kernel, device, poisoned):
    inputs, upstream = make_inputs((3, 0, 5), torch.float32, device)
    y, _, dgi, dw_hh, db_hn, _ = outputs_and_gradients(recurrence(kernel), inputs, upstream)
    assert (y.shape, dgi.shape) == ((3, 0, 2, 5), (3, 0, 2, 15))
    assert not dw_hh.any()
    assert not db_hn.any()


@every_kernel
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_used(kernel, used, device, poisoned):
    inputs, upstream = make_inputs((3, 2, 5), torch.float32, device)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    recurrence(kernel)(*leaves)[used].backward(upstream[used])
    zeroed = [torch.zeros_like(x) if i != used else x for i, x in enumerate(upstream)]
    near([x.grad for x in leaves], expected(inputs, zeroed)[2:], 1e-5)


@every_kernel
def test_double_backward_is_refused(kernel, device):
    inputs, _ = make_inputs((2, 2, 3), torch.float32, device)
    inputs[0].requires_grad_()
    y, _ = recurrence(kernel)(*inputs)
    (dgi,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'gru_backward cannot be differentiated; .*backend="reference"'):
        dgi.sum().backward()


@in_triton
@pytest.mark.parametrize("wanted", [True, False])
def test_gates_and_states_are_kept_once_where_a_gradient_is_wanted(kernel, wanted, device, poisoned):
    inputs, _ = make_inputs((3, 2, 5), torch.float32, device)
    inputs[0].requires_grad_(wanted)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        recurrence(kernel)(*inputs)
    assert sorted(shapes) == (sorted([(3, 2, 2, 5), (3, 2, 2, 4, 5), (2, 2, 5), (2, 15, 5)]) if wanted else [])
    assert torch.ops.bigru.gru_forward(*inputs, "fp32", False, "triton")[2].numel() == 0


@every_kernel
def test_no_gates_are_computed_under_no_grad(kernel, device):
    inputs, _ = make_inputs((3, 2, 5), torch.float32, device)
    inputs[0].requires_grad_()
    with Recorder() as recorder:
        with torch.no_grad():
            recurrence(kernel)(*inputs)
        recurrence(kernel)(*inputs)
    assert [args[5] for function, args in recorder.calls if function is FORWARD] == [False, True]


@every_kernel
def test_backward_without_saved_gates_is_refused(kernel, device):
    inputs, _ = make_inputs((3, 2, 5), torch.float32, device)
    inputs[0].requires_grad_()
    y, _, _ = FORWARD(*inputs, "fp32", False, kernel)
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


@every_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gi, w, b, h: (gi[..., 0, :], w, b, h), r"gi: expected shape \(T, B, 2, 3H\)"),
        (lambda gi, w, b, h: (gi, w[:1], b, h), r"w_hh: expected shape \(2, 15, 5\)"),
        (lambda gi, w, b, h: (gi, w, b[:, :3], h), r"b_hn: expected shape \(2, 5\)"),
        (lambda gi, w, b, h: (gi, w, b, h[:, :1]), r"h0: expected shape \(2, 2, 5\)"),
        (lambda gi, w, b, h: (gi, w.half(), b, h), "w_hh: expected torch.float32"),
    ],
)
def test_bad_operands_are_named(kernel, change, message, device):
    inputs, _ = make_inputs((3, 2, 5), torch.float32, device)
    with pytest.raises(ValueError, match=message):
        recurrence(kernel)(*change(*inputs))


@in_triton
@pytest.mark.parametrize(
    ("steps", "dtype", "precision", "raised", "message"),
    [
        (3, torch.float64, "fp32", RuntimeError, r"'triton' cannot serve this call: the input is torch\.float64"),
        (0, torch.float32, "fp32", RuntimeError, "T = 0"),
        (1, torch.float32, "fp64", ValueError, "'fp32' or 'tf32'"),
    ],
)
def test_calls_that_nobody_serves(kernel, steps, dtype, precision, raised, message, device):
    inputs, _ = make_inputs((steps, 2, 5), dtype, device)
    with pytest.raises(raised, match=message):
        fused_gru_recurrence(*inputs, precision, kernel)
