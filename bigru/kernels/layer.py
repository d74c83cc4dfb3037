"""One bidirectional layer in the fused kernels: input products, recurrence and every gradient.

In eager mode a layer is one autograd node that works below autograd, since at the sizes people train the GPU waits for
Python: recorded one by one, the stacking, slicing and adding of eight small tensors costs more than the recurrence.
Under torch.compile, torch.export and whatever else records operators the same layer is spelled out in operators that
they can see through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels import registry
from bigru.kernels.recurrence import (
    How,
    fused_gru_recurrence,
    parameter_gradients,
    run_backward,
    run_forward,
    states_before,
)
from bigru.kernels.reference import layer_operands
from bigru.kernels.transforms import refuse_second_derivative, refuse_transforms
from bigru.kernels.varlen import Varlen


def fused_gru_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    precision: str,
    kernel: str,
    varlen: Varlen | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs one layer; the equations are in `bigru.kernels.reference`.

    Args:
        x: (T, B, I) input, or (P, I) with a varlen.
        h0: (D, B, H) initial states.
        weights: w_ih (3H, I), w_hh (3H, H) and, with biases, b_ih (3H), b_hh (3H), of the first direction, then of the
            second: the order of `torch.nn.GRU`.
        dtype: what all of them are converted to.
        precision: "fp32" or "tf32", for fp32 storage.
        kernel: name of a kernel that does not refuse the call.
        varlen: how the rows make steps, if they are packed; not under a compiler.
        batch_first: whether y is returned as (B, T, D * H).

    Returns:
        y (T, B, D * H), or (P, D * H), no view in eager mode, and h_n (D, B, H).

    Raises:
        RuntimeError: inside a transform of torch.func, in forward mode, for a second derivative, for a traced varlen,
            or for weights of other shapes.
    """
    refuse_transforms(x, h0, *weights)
    if varlen is not None and torch.jit.is_tracing():  # make_fx refuses by itself
        raise RuntimeError(
            "a PackedSequence cannot be traced in the fused kernels, since which rows there are is data; with "
            'backend="auto" or "torch" it can'
        )
    if varlen is None and (torch.compiler.is_compiling() or _watched()):
        gi, w_hh, b_hn = layer_operands(x.to(dtype), [weight.to(dtype) for weight in weights])
        y, h_n = fused_gru_recurrence(gi, w_hh, b_hn, h0.to(dtype), precision, kernel)
        y = y.flatten(-2)
        return y.transpose(0, 1) if batch_first else y, h_n
    _check_weights(weights, x.shape[-1], h0.shape[2])
    if (whole_layer := registry.get(kernel).layer) is not None:
        if any(tensor.dtype != dtype for tensor in (x, h0, *weights)):
            x, h0, weights = x.to(dtype), h0.to(dtype), [weight.to(dtype) for weight in weights]
        return whole_layer(x, h0, weights, varlen, batch_first)
    how = How(precision, kernel, varlen)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h0, *weights)):
        return _Layer.apply(x, h0, how, dtype, batch_first, *weights)
    y, h_n, *_ = _forward(x, h0, weights, how, dtype, batch_first, save=False)
    return y, h_n


def _check_weights(weights: Sequence[Tensor], inputs: int, hidden: int) -> None:
    """Raises RuntimeError unless weights have a layer's shapes; those that a functional_call brings need not."""
    shapes = ((3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))[: len(weights) // 2] * 2
    for weight, shape in zip(weights, shapes, strict=True):
        if weight.shape != shape:
            raise RuntimeError(f"weight: expected shape {shape}, got {tuple(weight.shape)}")


def _forward(
    x: Tensor, h0: Tensor, weights: Sequence[Tensor], how: How, dtype: torch.dtype, batch_first: bool, save: bool
) -> tuple[Tensor, ...]:
    """Returns y, h_n and, for the gradient, gates and x, h0, w_ih (D * 3H, I), w_hh (D, 3H, H) as computed with."""
    hidden = h0.shape[2]
    half = len(weights) // 2
    w_ih, w_hh, *biases = zip(weights[:half], weights[half:], strict=True)
    # One copy gathers all weights, w_hh first, which the kernels read fastest where memory is aligned; b_hn comes a
    # second time, in one piece.
    pieces: list[tuple[Tensor, ...]] = [w_hh, w_ih, *biases]
    if biases:
        pieces.append(tuple(b_hh[2 * hidden :] for b_hh in biases[1]))
    flat = torch.cat([tensor.reshape(-1) for piece in pieces for tensor in piece]).to(dtype)
    x, h0 = x.to(dtype).contiguous(), h0.to(dtype)
    w_hh, w_ih, *biases = flat.split([2 * piece[0].numel() for piece in pieces])
    w_ih, w_hh = w_ih.view(6 * hidden, -1), w_hh.view(2, 3 * hidden, hidden)
    bias, b_hn = None, None
    if biases:
        bias, b_hh, b_hn = biases
        bias.view(2, -1)[:, : 2 * hidden] += b_hh.view(2, -1)[:, : 2 * hidden]
        b_hn = b_hn.view(2, hidden)
    gi = torch.nn.functional.linear(x, w_ih, bias).unflatten(-1, (2, 3 * hidden))
    # No view, and no row more than there are steps: y may be detached in place, and is saved as it is.
    y = gi.new_empty(*gi.shape[:-2], 2 * hidden)
    out = y.unflatten(-1, (2, hidden))
    _, h_n, gates = run_forward(gi, w_hh, b_hn, h0, how, save, out)
    if batch_first:
        y.transpose_(0, 1)
    return y, h_n, gates, x, h0, w_ih, w_hh


def _watched() -> bool:
    """Returns whether a tracer or a mode (make_fx, FakeTensorMode, selective checkpointing) records operators.

    It cannot see a launch.
    """
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, how: How, dtype: torch.dtype, batch_first: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, h_n, *kept = _forward(x, h0, weights, how, dtype, batch_first, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *kept)
        ctx.how, ctx.batch_first, ctx.dtypes = how, batch_first, [t.dtype for t in (x, h0, *weights)]
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: where a caller names its inputs, it leaves terms of second derivatives out silently.
        refuse_second_derivative(dy, dh_n)
        y, gates, x, h0, w_ih, w_hh = ctx.saved_tensors
        hidden = h0.shape[2]
        if ctx.batch_first:
            y, dy = y.transpose(0, 1), None if dy is None else dy.transpose(0, 1)
        y, dy = y.unflatten(-1, (2, hidden)), None if dy is None else dy.unflatten(-1, (2, hidden))
        filled = None if ctx.how.varlen is None else y.new_empty(y.shape)
        dgi, dq, dh0 = run_backward(dy, dh_n, y, gates, h0, w_hh, ctx.how, filled)
        h_prev = states_before(y, h0) if filled is None else filled.transpose(0, 1)
        needs_x, needs_h0, _, _, _, *needs = ctx.needs_input_grad
        dx = (dgi.flatten(0, -3).flatten(1) @ w_ih).view(x.shape) if needs_x else None
        gradients = [dx, dh0 if needs_h0 else None, *parameter_gradients(dgi, dq, x, h_prev, needs)]
        gradients = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return *gradients[:2], None, None, None, *gradients[2:]
