"""One bidirectional layer in the fused kernels: input products, recurrence and every gradient.

In eager mode a layer is one autograd node that works below autograd, since at the sizes people train the GPU waits for
Python: recorded one by one, the stacking, slicing and adding of eight small tensors costs more than the recurrence.
Under torch.compile, torch.export and whatever else records operators the same layer is spelled out in operators that
they can see through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels import registry
from bigru.kernels.config import without_autocast
from bigru.kernels.kernel import Forward
from bigru.kernels.recurrence import (
    How,
    fused_gru_recurrence,
    on_device_of,
    recurrent_gradients,
    run_backward,
    start_forward,
)
from bigru.kernels.reference import layer_operands
from bigru.kernels.transforms import refuse_second_derivative, refuse_transforms
from bigru.kernels.varlen import Varlen


def fused_gru_layer(
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    hidden: int,
    dtype: torch.dtype,
    precision: str,
    kernel: str,
    varlen: Varlen | None = None,
    batch_first: bool = False,
    h_n: Tensor | None = None,
    given: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs one layer; the equations are in `bigru.kernels.reference`.

    Args:
        x: (T, B, I) input, or (P, I) with a varlen.
        h0: (D, B, H) initial states; None for zeros, which only a kernel that `makes_states` takes.
        weights: w_ih (3H, I), w_hh (3H, H) and, with biases, b_ih (3H), b_hh (3H), of the first direction, then of the
            second: the order of `torch.nn.GRU`.
        hidden: H.
        dtype: what all of them are converted to.
        precision: "fp32" or "tf32", for fp32 storage.
        kernel: name of a kernel that does not refuse the call.
        varlen: how the rows make steps, if they are packed; not under a compiler.
        batch_first: whether y is returned as (B, T, D * H).
        h_n: (D, B, H) memory for h_n, contiguous, where no gradient is wanted; of a kernel that `makes_states` too.
        given: whether h0 is the caller's own, not zeros that stand for none.

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
    if h0 is not None and varlen is None and (torch.compiler.is_compiling() or _watched()):
        gi, w_hh, b_hn = layer_operands(x.to(dtype), [weight.to(dtype) for weight in weights])
        y, h_n = fused_gru_recurrence(gi, w_hh, b_hn, h0.to(dtype), precision, kernel, given)
        y = y.flatten(-2)
        return y.transpose(0, 1) if batch_first else y, h_n
    _check_weights(weights, x.shape[-1], hidden)
    if h0 is not None and (whole_layer := registry.get(kernel).layer) is not None:
        if any(tensor.dtype != dtype for tensor in (x, h0, *weights)):
            x, h0, weights = x.to(dtype), h0.to(dtype), [weight.to(dtype) for weight in weights]
        return whole_layer(x, h0, weights, varlen, batch_first)
    how = How(precision, kernel, varlen, given and h0 is not None)
    if h_n is None and wants_gradient(x, h0, weights):
        y, h_n = _Layer.apply(x, h0, how, dtype, batch_first, *weights)
        return y, h_n
    y, h_n, *_ = _forward(x, h0, weights, how, dtype, batch_first, save=False, h_n=h_n)
    return y, h_n


def makes_states(kernel: str) -> bool:
    """Returns whether layers of a kernel take None for an initial state of zeros: those of one launched in eager mode.

    Such kernels do not take whole layers, and nobody records what is done.
    """
    return not torch.compiler.is_compiling() and registry.get(kernel).layer is None and not _watched()


def wants_gradient(x: Tensor, h0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Returns whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h0, *weights) if tensor is not None)


def _check_weights(weights: Sequence[Tensor], inputs: int, hidden: int) -> None:
    """Raises RuntimeError unless weights have a layer's shapes; those that a functional_call brings need not."""
    found, shapes = [weight.shape for weight in weights], _shapes(len(weights), inputs, hidden)
    if found != shapes:
        got, expected = next(pair for pair in zip(found, shapes, strict=True) if pair[0] != pair[1])
        raise RuntimeError(f"weight: expected shape {expected}, got {tuple(got)}")


@functools.lru_cache(maxsize=1024)
def _shapes(count: int, inputs: int, hidden: int) -> list[Any]:
    return [(3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)][: count // 2] * 2


@functools.cache
def _gather() -> Callable[..., Any]:
    from bigru.kernels.gather import gather  # imports triton

    return gather


@functools.cache
def _collect() -> Callable[..., Any]:
    from bigru.kernels.collect import collect

    return collect


def _forward(
    x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], how: How, dtype: torch.dtype, batch_first: bool,
    save: bool, h_n: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Returns y, h_n and, for the gradient, gates and what `gather` makes of x, h0, w_ih and w_hh."""
    rows, hidden = x.shape[:-1], weights[1].shape[1]
    with on_device_of(x):
        x, h0, w_ih, w_hh, bias, b_hn = _gather()(x, h0, weights, how.varlen.batch if how.varlen else rows[1], dtype)
        gi = torch.mm(x, w_ih) if bias is None else torch.addmm(bias, x, w_ih)
        # No view, and no row more than there are steps: y may be detached in place, and is saved as it is.
        y = gi.new_empty((*rows, 2 * hidden))
        gates = gi.new_empty(registry.get(how.kernel).gates_shape((*rows, 2), hidden)) if save else None
        h_n = torch.empty_like(h0) if h_n is None else h_n
        start_forward(Forward(gi, w_hh, b_hn, h0, y, h_n, gates, how.varlen, how.given), how)
    if batch_first:
        y.transpose_(0, 1)
    return y, h_n, gates, x, h0, w_ih, w_hh[: 6 * hidden * hidden] if save else w_hh


def _watched() -> bool:
    """Returns whether a tracer or a mode (make_fx, FakeTensorMode, selective checkpointing) records operators.

    It cannot see a launch.
    """
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, how: How, dtype: torch.dtype, batch_first: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, h_n, *kept = _forward(x, h0, weights, how, dtype, batch_first, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, *kept)
        ctx.how, ctx.batch_first, ctx.zeros = how, batch_first, h0 is None
        ctx.dtypes = [None if t is None else t.dtype for t in (x, h0, *weights)]
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: where a caller names its inputs, it leaves terms of second derivatives out silently.
        refuse_second_derivative(dy, dh_n)
        y, gates, x, h0, w_ih, w_hh = ctx.saved_tensors
        hidden = h0.shape[2]
        if ctx.batch_first:
            y, dy = y.transpose(0, 1), None if dy is None else dy.transpose(0, 1)
        rows = y.shape[:-1]
        # A hook of saved tensors may have given them back in another layout.
        y, h0 = y.contiguous().view(*rows, 2, hidden), h0.contiguous()
        dy = None if dy is None else dy.view(y.shape)
        if dh_n is None and ctx.zeros:
            dh_n = h0
        h_prev = None if ctx.how.varlen is None else torch.empty_like(y)
        dgi, dq, dh0 = run_backward(dy, dh_n, y, gates, h0, w_hh, ctx.how, h_prev)
        needs_x, needs_h0, _, _, _, *needs = ctx.needs_input_grad
        # A backward pass inside autocast: its products are of the dtype of the forward pass all the same.
        with without_autocast(y.device.type):
            dx = torch.mm(dgi.view(-1, 6 * hidden), w_ih.t()).view(*rows, w_ih.shape[0]) if needs_x else None
            gradients = [dx, dh0 if needs_h0 else None, *_parameter_gradients(dgi, dq, x, y, h0, h_prev, needs)]
        for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if gradient is not None and gradient.dtype != dtype:
                gradients[i] = gradient.to(dtype)
        return *gradients[:2], None, None, None, *gradients[2:]


def _parameter_gradients(
    dgi: Tensor, dq: Tensor, x: Tensor, y: Tensor, h0: Tensor, h_prev: Tensor | None, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Computes the gradients of a layer's weights and biases, where wanted, in the order of `needs`.

    `h_prev`, the state before each step, (P, D, H), is None where it is still to be had from y and h0.
    """
    half, hidden = len(needs) // 2, dq.shape[-1]
    w_ih, w_hh, *biases = (needs[i] or needs[half + i] for i in range(half))
    with on_device_of(y):
        states, sums = _collect()(dgi, dq, y, h0, w_hh and h_prev is None, any(biases))
    gradients: list[Tensor | None] = [None] * len(needs)
    if w_ih:
        gradients[::half] = torch.mm(dgi.view(-1, 6 * hidden).t(), x).view(2, 3 * hidden, x.shape[1]).unbind()
    if w_hh:
        h_prev = states if h_prev is None else h_prev
        gradients[1::half] = recurrent_gradients(dgi, dq, h_prev.view(-1, 2, hidden).transpose(0, 1)).unbind()
    if sums is not None:
        gradients[2], gradients[3], gradients[half + 2], gradients[half + 3] = sums.unbind()
    return gradients
