"""A call's layers in the kernels that are launched, in eager mode.

A layer is one autograd node that works below autograd, since at the sizes people train the GPU waits for Python:
recorded one by one, the stacking, slicing and adding of eight small tensors costs more than the recurrence.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigru.kernels import registry
from bigru.kernels.backends import KERNELS
from bigru.kernels.config import without_autocast
from bigru.kernels.layer import check_weights, recorded, refuse_traced
from bigru.kernels.recurrence import on_device_of
from bigru.kernels.transforms import refuse_second_derivative, refuse_transforms
from bigru.kernels.varlen import Varlen

_dtype_of, _wants_gradient = operator.attrgetter("dtype"), operator.attrgetter("requires_grad")


class Common(NamedTuple):
    """What the layers of a call have in common."""

    kernel: str
    precision: str
    dtype: torch.dtype
    hidden: int
    batch: int
    varlen: Varlen | None


def launches(backend: str, ragged: bool) -> bool:
    """Returns whether `launched_gru` serves a call: unless operators are recorded, or compiled with ragged rows."""
    if backend not in KERNELS or (torch.compiler.is_compiling() if ragged else recorded()):
        return False
    return registry.get(backend).layer is None


def launched_gru(
    x: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    common: Common,
    layers: int,
    batch_first: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Runs layers, one after another; the equations are in `bigru.kernels.reference`.

    Args:
        x: (T, B, I) input, (B, T, I) if `batch_first`, or (P, I) with a varlen.
        hx: (layers * D, B, H) initial states; None for zeros.
        weights: of all layers, as of one for `bigru.kernels.layer.fused_gru_layer`.
        common: what they have in common.
        layers: their number.
        batch_first: whether x comes, and y is returned, with the batch first.
        dropout: probability of dropping an output between two layers; 0 but in training.

    Returns:
        y (T, B, D * H), or (P, D * H), no view, and h_n (layers * D, B, H).

    Raises:
        RuntimeError: inside a transform of torch.func, in forward mode, for a second derivative, for a traced varlen,
            or for weights of other shapes.
    """
    refuse_transforms(x, hx, *weights)
    refuse_traced(common.varlen)
    each, size = len(weights) // layers, 2 * common.batch * common.hidden
    if x.is_neg():  # they are read by address
        x = x.resolve_neg()
    hx = None if hx is None else hx.to(common.dtype).resolve_neg().contiguous()
    wanted = torch.is_grad_enabled() and any(map(_wants_gradient, (x, *weights, *(() if hx is None else (hx,)))))
    h_n = None if wanted else x.new_empty((2 * layers, common.batch, common.hidden), dtype=common.dtype)
    states = []
    with without_autocast(x.device.type), on_device_of(x):
        for layer in range(layers):
            last, own = layer == layers - 1, weights[layer * each : (layer + 1) * each]
            swaps = batch_first and layer == 0, batch_first and last
            h0 = None if hx is None else hx[2 * layer : 2 * layer + 2]
            check_weights(own, x.shape[-1], common.hidden)
            # Layers below all that is trained keep nothing.
            if wanted and any(map(_wants_gradient, (x, *own) if h0 is None else (x, h0, *own))):
                x, state = _Layer.apply(x, h0, common, swaps, *own)
            else:
                plan = _plan(x, h0, own, common, swaps, 0 if wanted else layer * size)
                x, state, *_ = plan.forward(x, h0, own, common.varlen, False, h_n)
            states.append(state)
            if dropout and not last:
                x = nn.functional.dropout(x, dropout)
    if h_n is None:
        h_n = states[0] if layers == 1 else torch.cat(states)
    return x, h_n


@functools.cache
def _planner() -> Callable[..., Any]:
    from bigru.kernels.plan import plan_of  # imports triton

    return plan_of


def _plan(
    x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], common: Common, swaps: tuple[bool, bool], first: int = 0
) -> Any:
    """Returns the `bigru.kernels.plan.Plan` of a layer."""
    kernel, precision, dtype, hidden, batch, varlen = common
    dtypes, ragged, zeros = (x.dtype, *map(_dtype_of, weights), dtype), varlen is not None, h0 is None
    about = dtypes, x.shape, x.stride(), hidden, batch, ragged, zeros, first, *swaps
    return _planner()(kernel, precision, x.device, *about)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, common: Common, swaps: tuple[bool, bool], *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = _plan(x, h0, weights, common, swaps)
        y, h_n, gates, gathered = plan.forward(x, h0, weights, common.varlen, True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gates, None if plan.copied else x, h0, gathered)
        ctx.plan, ctx.varlen = plan, common.varlen
        ctx.dtypes = [x.dtype, common.dtype, *map(_dtype_of, weights)] if plan.converts else None
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, ...]:
        # Not once_differentiable: where a caller names its inputs, it leaves terms of second derivatives out silently.
        refuse_second_derivative(dy, dh_n)
        dy, dh_n = (t.resolve_neg() if t is not None and t.is_neg() else t for t in (dy, dh_n))
        y, gates, x, h0, gathered = ctx.saved_tensors
        for_x, for_h0, _, _, *needs = ctx.needs_input_grad
        half = len(needs) // 2
        w_ih, w_hh, *biases = map(operator.or_, needs[:half], needs[half:])
        # A backward pass inside autocast: its products are of the dtype of the forward pass all the same.
        with without_autocast(y.device.type), on_device_of(y):
            gradients = ctx.plan.backward(
                dy, dh_n, y, gates, x, h0, gathered, ctx.varlen, (for_x, for_h0, w_ih, w_hh, any(biases))
            )
        if half == 2:
            gradients = gradients[:4] + gradients[6:8]
        if ctx.dtypes is not None:
            for i, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
                gradients[i] = None if gradient is None else gradient.to(dtype)
        return *gradients[:2], None, None, *gradients[2:]
