"""One bidirectional layer in the fused kernels, where it is not launched: whole on a CPU, or spelled out.

Under torch.compile, torch.export and whatever else records operators a layer is spelled out in operators that they can
see through. In eager mode on a GPU `bigru.kernels.launched` serves.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels import registry
from bigru.kernels.recurrence import fused_gru_recurrence
from bigru.kernels.reference import layer_operands
from bigru.kernels.transforms import refuse_transforms
from bigru.kernels.varlen import Varlen


def fused_gru_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    hidden: int,
    dtype: torch.dtype,
    precision: str,
    kernel: str,
    varlen: Varlen | None = None,
    batch_first: bool = False,
    given: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs one layer; the equations are in `bigru.kernels.reference`.

    Args:
        x: (T, B, I) input, or (P, I) with a varlen.
        h0: (D, B, H) initial states.
        weights: w_ih (3H, I), w_hh (3H, H) and, with biases, b_ih (3H), b_hh (3H), of the first direction, then of the
            second: the order of `torch.nn.GRU`.
        hidden: H.
        dtype: what all of them are converted to.
        precision: "fp32" or "tf32", for fp32 storage.
        kernel: name of a kernel that does not refuse the call.
        varlen: how the rows make steps, if they are packed; not under a compiler.
        batch_first: whether y is returned as (B, T, D * H).
        given: whether h0 is the caller's own, not zeros that stand for none.

    Returns:
        y (T, B, D * H), or (P, D * H), no view in eager mode, and h_n (D, B, H).

    Raises:
        RuntimeError: inside a transform of torch.func, in forward mode, for a second derivative, for a traced varlen,
            or for weights of other shapes.
    """
    refuse_transforms(x, h0, *weights)
    refuse_traced(varlen)
    if varlen is None and recorded():
        gi, w_hh, b_hn = layer_operands(x.to(dtype), [weight.to(dtype) for weight in weights])
        y, h_n = fused_gru_recurrence(gi, w_hh, b_hn, h0.to(dtype), precision, kernel, given)
        y = y.flatten(-2)
        return y.transpose(0, 1) if batch_first else y, h_n
    check_weights(weights, x.shape[-1], hidden)
    if any(tensor.dtype != dtype for tensor in (x, h0, *weights)):
        x, h0, weights = x.to(dtype), h0.to(dtype), [weight.to(dtype) for weight in weights]
    whole_layer = registry.get(kernel).layer
    assert whole_layer is not None  # else `bigru.kernels.launched` serves
    return whole_layer(x, h0, weights, varlen, batch_first)


def recorded() -> bool:
    """Returns whether a compiler, a tracer or a mode (make_fx, FakeTensorMode, selective checkpointing) records
    operators; they can see neither a launch nor a call of the C extension."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def refuse_traced(varlen: Varlen | None) -> None:
    """Raises RuntimeError for a layout where torch.jit traces; make_fx refuses by itself."""
    if varlen is not None and torch.jit.is_tracing():
        raise RuntimeError(
            "a PackedSequence cannot be traced in the fused kernels, since which rows there are is data; with "
            'backend="auto" or "torch" it can'
        )


def check_weights(weights: Sequence[Tensor], inputs: int, hidden: int) -> None:
    """Raises RuntimeError unless weights have a layer's shapes; those that a functional_call brings need not."""
    found, shapes = [*map(_shape_of, weights)], _shapes(len(weights), inputs, hidden)
    if found != shapes:
        got, expected = next(pair for pair in zip(found, shapes, strict=True) if pair[0] != pair[1])
        raise RuntimeError(f"weight: expected shape {expected}, got {tuple(got)}")


_shape_of = operator.attrgetter("shape")


@functools.lru_cache(maxsize=1024)
def _shapes(count: int, inputs: int, hidden: int) -> list[Any]:
    return [(3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)][: count // 2] * 2
