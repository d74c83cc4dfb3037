"""The recurrence as two custom operators, `bigru::gru_forward` and `bigru::gru_backward`, joined by autograd.

Input products stay outside (`reference.input_gates`), so that ATen's matrix product and its gradient serve them.
"""

import torch
from torch import Tensor

from bigru.kernels import plain
from bigru.kernels.packed import Packing
from bigru.kernels.transforms import INSTEAD, refuse_transforms


def fused_gru_recurrence(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, precision: str, kernel: str = "portable"
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence in the fused kernels; the equations are in `bigru.kernels.reference`.

    Args:
        gi: (T, B, D, 3H) input side of the gates, fp32, bf16 or fp16.
        w_hh: (D, 3H, H) recurrent weights, of gi's dtype.
        b_hn: (D, H) recurrent bias of n, or None.
        h0: (D, B, H) initial state.
        precision: "fp32" or "tf32", for fp32 storage.
        kernel: one of `launch.KERNELS`, or "plain": `bigru.kernels.plain` instead, on any device and in any dtype.

    Returns:
        y (T, B, D, H) and h_n (D, B, H).
    """
    refuse_transforms(gi, w_hh, b_hn, h0)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (gi, w_hh, b_hn, h0))
    save = wanted and torch.is_grad_enabled()
    y, h_n, _ = torch.ops.bigru.gru_forward(gi, w_hh, b_hn, h0, precision, save, kernel)
    return y, h_n


# The last argument is not called `kernel`: torch 2.11 to 2.13's inductor has one of that name.
@torch.library.custom_op("bigru::gru_forward", mutates_args=())
def gru_forward(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, precision: str, save: bool, family: str = "portable"
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and, if `save`, the gates that the backward operator needs (else an empty tensor)."""
    if family == "plain":
        return plain.gru_forward(gi, w_hh, b_hn, h0, save)
    from bigru.kernels import launch  # triton is needed from here on, not before

    check_recurrence(gi, w_hh, b_hn, h0, precision, family)
    return launch.gru_forward(gi, w_hh, b_hn, h0, precision, save, family)  # type: ignore[arg-type]


@gru_forward.register_fake
def _(gi, w_hh, b_hn, h0, precision, save, family="portable"):
    steps, batch, directions, _ = gi.shape
    hidden = h0.shape[-1]
    y = gi.new_empty(steps, batch, directions, hidden)
    shape: tuple[int, ...] = (0,)
    if save and family == "plain":
        shape = (steps, batch, directions, 4, hidden)
    elif save:
        from bigru.kernels import launch

        shape = launch.gates_shape(family, steps, batch, directions, hidden)
    gates = gi.new_empty(shape)
    return y, h0.new_empty(h0.shape), gates


@torch.library.custom_op("bigru::gru_backward", mutates_args=())
def gru_backward(
    dy: Tensor,
    dh_n: Tensor,
    y: Tensor,
    gates: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    precision: str,
    family: str = "portable",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gi, of q and of h0. Not differentiable itself: a second derivative raises."""
    if family == "plain":
        return plain.gru_backward(dy, dh_n, y, gates, h0, w_hh)
    from bigru.kernels import launch

    return launch.gru_backward(dy, dh_n, y, gates, h0, w_hh, precision, family)  # type: ignore[arg-type]


@gru_backward.register_fake
def _(dy, dh_n, y, gates, h0, w_hh, precision, family="portable"):
    steps, batch, directions, hidden = y.shape
    return y.new_empty(steps, batch, directions, 3 * hidden), y.new_empty(y.shape), h0.new_empty(h0.shape)


def check_recurrence(
    gi: Tensor,
    w_hh: Tensor,
    b_hn: Tensor | None,
    h0: Tensor,
    precision: str,
    kernel: str,
    packing: Packing | None = None,
) -> None:
    """Raises ValueError or RuntimeError unless a family of kernels can run the recurrence on these operands."""
    from bigru.kernels import launch

    rows = "T, B" if packing is None else "P"
    if gi.shape[-2:-1] != (2,) or gi.shape[-1] % 3 or gi.dim() != (4 if packing is None else 3):
        raise ValueError(f"gi: expected shape ({rows}, 2, 3H), got {tuple(gi.shape)}")
    steps, batch = gi.shape[:2] if packing is None else (packing.steps, packing.batch)
    directions, gates = gi.shape[-2:]
    hidden = gates // 3
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "w_hh": (w_hh, (directions, gates, hidden)),
        "h0": (h0, (directions, batch, hidden)),
    }
    if b_hn is not None:
        expected["b_hn"] = (b_hn, (directions, hidden))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != gi.dtype or tensor.device != gi.device:
            raise ValueError(
                f"{name}: expected {gi.dtype} on {gi.device} like gi, got {tensor.dtype} on {tensor.device}"
            )
    if steps == 0:
        raise RuntimeError("gi: expected at least one time step, got T = 0")
    if gi.dtype not in launch.DTYPES:
        raise ValueError(f"gi: expected float32, bfloat16 or float16, got {gi.dtype}")
    if precision not in ("fp32", "tf32"):
        raise ValueError(f"precision: expected 'fp32' or 'tf32', got {precision!r}")
    if kernel not in launch.KERNELS:
        raise ValueError(f"kernel: expected one of {launch.KERNELS}, got {kernel!r}")
    if gi.device.type != "cuda" and kernel != "portable":
        raise RuntimeError(f"gi: expected a CUDA tensor, which the {kernel} kernels need, got one on {gi.device}")
    if gi.device.type != "cuda" and not launch.interpreted():
        raise RuntimeError(f"gi: expected a CUDA tensor (or TRITON_INTERPRET=1), got one on {gi.device}")
    if refusal := launch.refusal(kernel, hidden, gi.dtype, precision, launch.describe(gi.device), packing is not None):
        raise RuntimeError(f"kernel {kernel!r} cannot serve this call: {refusal}")


def _setup_context(ctx, inputs, output):
    _, w_hh, b_hn, h0, precision, save, family = inputs
    y, _, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, gates, h0, w_hh)
    ctx.precision, ctx.family, ctx.saved_gates, ctx.has_bias = precision, family, save, b_hn is not None


def _backward(ctx, dy, dh_n, _):
    if not ctx.saved_gates:
        raise RuntimeError("bigru::gru_forward was called with save=False: it kept nothing for a backward pass")
    y, gates, h0, w_hh = ctx.saved_tensors
    dy = torch.zeros_like(y) if dy is None else dy
    dh_n = torch.zeros_like(h0) if dh_n is None else dh_n
    dgi, dq, dh0 = torch.ops.bigru.gru_backward(dy, dh_n, y, gates, h0, w_hh, ctx.precision, ctx.family)
    dw_hh = recurrent_weight_gradient(dgi, dq, y, h0) if ctx.needs_input_grad[1] else None
    db_hn = dq.sum((0, 1)) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return dgi, dw_hh, db_hn, dh0, None, None, None


def recurrent_weight_gradient(dgi: Tensor, dq: Tensor, y: Tensor, h0: Tensor) -> Tensor:
    """Sum over time and batch of dgh h_prev^T, where h_prev is y shifted by one step and, at the first step, h0."""
    hidden = y.shape[-1]
    rows = []
    for d in range(y.shape[2]):
        first = 0 if d == 0 else -1
        later, earlier = (slice(1, None), slice(None, -1)) if d == 0 else (slice(None, -1), slice(1, None))
        h_prev = y[earlier, :, d].flatten(0, 1)
        for gradient in (dgi[..., : 2 * hidden], dq):
            at_first = gradient[first, :, d].T @ h0[d]
            rows.append(torch.addmm(at_first, gradient[later, :, d].flatten(0, 1).T, h_prev))
    return torch.cat(rows).view(y.shape[2], 3 * hidden, hidden)


gru_forward.register_autograd(_backward, setup_context=_setup_context)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError(f"bigru::gru_backward cannot be differentiated; {INSTEAD}")


gru_backward.register_autograd(_no_second_derivative)
