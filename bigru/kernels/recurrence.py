"""The recurrence in any kernel, as the custom operators `bigru::gru_forward` and `bigru::gru_backward`.

They are for compilers and for whatever else records operators; in eager mode layers do without. Input products stay
outside (`bigru.kernels.layer`), so that ATen's matrix product and its gradient serve them.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bigru.kernels import registry
from bigru.kernels.config import Call, describe
from bigru.kernels.decompositions import onnx_recurrence
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.transforms import INSTEAD, refuse_transforms


def states_before(y: Tensor, h0: Tensor) -> Tensor:
    """Returns the state before each step, (D, T * B, H): direction 0 has it a row of y earlier, direction 1 later."""
    return torch.cat([h0[:1], y[:-1, :, 0], y[1:, :, 1], h0[1:]]).view(2, -1, h0.shape[2])


def recurrent_gradients(dgi: Tensor, dq: Tensor, h_prev: Tensor) -> Tensor:
    """Computes the gradient of w_hh, (D, 3H, H): dgh h_prev^T, summed over time and batch.

    `h_prev` is the state before each step, (D, T * B, H); dgi and dq are from the backward pass.
    """
    hidden = dq.shape[-1]
    dgi_d, dq_d = dgi.view(-1, 2, 3 * hidden).permute(1, 2, 0), dq.view(-1, 2, hidden).permute(1, 2, 0)
    dw_hh = dq.new_empty((2, 3 * hidden, hidden))
    torch.bmm(dgi_d[:, : 2 * hidden], h_prev, out=dw_hh[:, : 2 * hidden])
    torch.bmm(dq_d, h_prev, out=dw_hh[:, 2 * hidden :])
    return dw_hh


def _configured(kernel: str, precision: str, h0: Tensor) -> tuple[Kernel, Any]:
    """Returns the kernel of a call and its launch configuration."""
    _, batch, hidden = h0.shape
    found = registry.get(kernel)
    return found, found.choose(Call(describe(h0.device), h0.dtype, hidden, precision), batch)


_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Returns a context in which a tensor's device is the current one."""
    away = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if away else _HERE


def fused_gru_recurrence(
    gi: Tensor,
    w_hh: Tensor,
    b_hn: Tensor | None,
    h0: Tensor,
    precision: str,
    kernel: str = "triton",
    given: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence as a differentiable operator.

    Args:
        gi, w_hh, b_hn, h0: as in `bigru.kernels.kernel.Forward`, of one dtype; not yet contiguous.
        precision: "fp32" or "tf32", for fp32 storage.
        kernel: one of `registry.KERNELS`.
        given: whether the initial states are the caller's own, not zeros that stand for none.

    Returns:
        y (T, B, D, H) and h_n (D, B, H).
    """
    refuse_transforms(gi, w_hh, b_hn, h0)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (gi, w_hh, b_hn, h0))
    # A trace is differentiable also where it was made without gradients, as torch.jit's check of a trace does.
    save = (wanted and torch.is_grad_enabled()) or torch.jit.is_tracing()
    if not torch.compiler.is_compiling():
        register_flop_formulas()
    y, h_n, _ = torch.ops.bigru.gru_forward(gi, w_hh, b_hn, h0, precision, save, kernel, given)
    return y, h_n


def _at_hand(kernel: str, operand: Tensor) -> str:
    """Returns "scan" for "cpu" where that cannot serve: exported programs also run where the extension is not built."""
    call = Call(describe(operand.device), operand.dtype, operand.shape[-1])
    return "scan" if kernel == "cpu" and registry.get(kernel).refusal(call) else kernel


# No argument is called `kernel`: torch 2.11 to 2.13's inductor has one of that name.
@torch.library.custom_op("bigru::gru_forward", mutates_args=())
def gru_forward(
    gi: Tensor,
    w_hh: Tensor,
    b_hn: Tensor | None,
    h0: Tensor,
    precision: str,
    save: bool,
    kernel_name: str,
    given: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, h_n and, if `save`, the gates that the backward operator needs (else an empty tensor)."""
    kernel_name = _at_hand(kernel_name, gi)
    check_operands(gi, w_hh, b_hn, h0, precision, kernel_name)
    rows, hidden = tuple(gi.shape[:-1]), h0.shape[2]
    gi, w_hh, h0 = gi.contiguous(), w_hh.contiguous(), h0.contiguous()
    b_hn = None if b_hn is None else b_hn.contiguous()
    y, h_n = gi.new_empty(*rows, hidden), torch.empty_like(h0)
    gates = gi.new_empty(registry.get(kernel_name).gates_shape(rows, hidden) if save else (0,))
    if h0.shape[1] > 0:
        kernel, config = _configured(kernel_name, precision, h0)
        with on_device_of(gi):
            kernel.forward(Forward(gi, w_hh, b_hn, h0, y, h_n, gates if save else None, None, given), config)
    return y, h_n, gates


@gru_forward.register_fake
def _(
    gi: Tensor,
    w_hh: Tensor,
    b_hn: Tensor | None,
    h0: Tensor,
    precision: str,
    save: bool,
    kernel_name: str,
    given: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    register_flop_formulas()
    rows, hidden = tuple(gi.shape[:-1]), h0.shape[-1]
    gates = gi.new_empty(registry.get(kernel_name).gates_shape(rows, hidden) if save else (0,))
    return gi.new_empty(*rows, hidden), h0.new_empty(h0.shape), gates


@torch.library.register_torch_dispatch("bigru::gru_forward", ProxyTorchDispatchMode)
def _(
    mode: ProxyTorchDispatchMode,
    operator: torch._ops.OpOverload,
    types: tuple[Any, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if torch.onnx.is_in_onnx_export():  # of a program, which holds the operator
        with mode:
            return onnx_recurrence(*args)
    return mode.__torch_dispatch__(operator, types, args, kwargs)


@torch.library.custom_op("bigru::gru_backward", mutates_args=())
def gru_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    y: Tensor,
    gates: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    precision: str,
    kernel_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of gi, of q and of h0. Not differentiable itself: a second derivative raises."""
    dy = torch.zeros_like(y) if dy is None else dy
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n
    dy, dh_n, y, gates, h0, w_hh = (tensor.contiguous() for tensor in (dy, dh_n, y, gates, h0, w_hh))
    dgi, dq, dh0 = y.new_empty(*y.shape[:-1], 3 * y.shape[-1]), torch.empty_like(y), torch.empty_like(h0)
    if h0.shape[1] > 0:
        kernel, config = _configured(_at_hand(kernel_name, y), precision, h0)
        with on_device_of(y):
            kernel.backward(Backward(dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0), config)
    return dgi, dq, dh0


@gru_backward.register_fake
def _(
    dy: Tensor, dh_n: Tensor, y: Tensor, gates: Tensor, h0: Tensor, w_hh: Tensor, precision: str, kernel_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(*y.shape[:-1], 3 * y.shape[-1]), y.new_empty(y.shape), h0.new_empty(h0.shape)


def check_operands(gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, precision: str, kernel: str) -> None:
    """Checks the operands of the recurrence, without which a kernel would read where there is nothing.

    Raises:
        ValueError: a shape, dtype, device, precision or kernel's name is wrong.
        RuntimeError: no time step, or the kernel cannot serve the call.
    """
    if gi.dim() != 4 or gi.shape[2] != 2 or gi.shape[3] % 3:
        raise ValueError(f"gi: expected shape (T, B, 2, 3H), got {tuple(gi.shape)}")
    steps, batch, directions, gates = gi.shape
    hidden = gates // 3
    expected = (
        ("w_hh", w_hh, (directions, gates, hidden)),
        ("h0", h0, (directions, batch, hidden)),
        ("b_hn", b_hn, (directions, hidden)),
    )
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != gi.dtype or tensor.device != gi.device:
            raise ValueError(
                f"{name}: expected {gi.dtype} on {gi.device} like gi, got {tensor.dtype} on {tensor.device}"
            )
    if steps == 0:
        raise RuntimeError("gi: expected at least one time step, got T = 0")
    if precision not in ("fp32", "tf32"):
        raise ValueError(f"precision: expected 'fp32' or 'tf32', got {precision!r}")
    if reason := registry.get(kernel).refusal(Call(describe(gi.device), gi.dtype, hidden, precision)):
        raise RuntimeError(f"kernel {kernel!r} cannot serve this call: {reason}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, w_hh, b_hn, h0, precision, save, kernel, _ = inputs
    y, _, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, gates, h0, w_hh)
    ctx.precision, ctx.kernel, ctx.saved_gates, ctx.has_bias = precision, kernel, save, b_hn is not None


def _backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.saved_gates:
        raise RuntimeError("bigru::gru_forward was called with save=False: it kept nothing for a backward pass")
    y, gates, h0, w_hh = ctx.saved_tensors
    dgi, dq, dh0 = torch.ops.bigru.gru_backward(dy, dh_n, y, gates, h0, w_hh, ctx.precision, ctx.kernel)
    dw_hh = None
    if ctx.needs_input_grad[1]:
        dw_hh = recurrent_gradients(dgi, dq, states_before(y, h0))
    db_hn = dq.sum((0, 1)) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dgi, dw_hh, db_hn, dh0, None, None, None, None


gru_forward.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError(f"bigru::gru_backward cannot be differentiated; {INSTEAD}")


gru_backward.register_autograd(_no_second_derivative)


def register_flop_formulas() -> None:
    """Registers the operators with torch.utils.flop_counter if that is imported: it imports triton.

    A counter copies the table when it is made, and may have been made before this: those in use get them too.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    for operator, formula in (
        (torch.ops.bigru.gru_forward, _forward_flops),
        (torch.ops.bigru.gru_backward, _backward_flops),
    ):
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            table = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if table is not None:
                table.setdefault(operator, flop_counter.flop_registry[operator])


def _forward_flops(gi: Sequence[int], w_hh: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the products with W_hh (3H, H), each a multiplication and an addition; those of the inputs are ATen's."""
    steps, batch, directions, gates = gi
    return 2 * steps * batch * directions * gates * w_hh[-1]


def _backward_flops(dy: Any, dh_n: Any, y: Sequence[int], *_: Any, **__: Any) -> int:
    """As many, with W_hh's transpose; the products for the weights' gradients are ATen's."""
    steps, batch, directions, hidden = y
    return 2 * steps * batch * directions * 3 * hidden * hidden
