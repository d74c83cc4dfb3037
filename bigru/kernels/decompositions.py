"""The operators in other people's terms: a whole model's ONNX graph, and programs for converters that know ATen alone.

A converter that meets `bigru::gru_forward` has no rule for it. `torch.onnx.export` gets ONNX's own GRU operator
instead, by itself, of a module and of a program of `torch.export`; for other converters such a program is rewritten by
`decompositions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels.reference import gru_recurrence


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Returns what a program of torch.export that holds a BiGRU can be rewritten with, for inference.

    The recurrence becomes ATen operators: unrolled where the number of time steps is fixed, else inside
    `torch.ops.higher_order.scan`, with batch and time as free as in the program.

    Example:
        >>> program = torch.export.export(model.eval(), (x,))
        >>> program = program.run_decompositions(bigru.decompositions())
    """
    from bigru.kernels import recurrence  # noqa: F401, defines the operators

    return {torch.ops.bigru.gru_forward.default: _gru_forward}


def _gru_forward(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, precision: str, save: bool, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(gi.dtype, torch.float32)
    rows, w, h = gi.to(wide), w_hh.to(wide), h0.to(wide)
    bias = h.new_zeros(h.shape[0], h.shape[2]) if b_hn is None else b_hn.to(wide)
    if isinstance(gi.shape[0], int):
        y, h_n = gru_recurrence(rows, w, bias, h)
    else:
        scan = torch.ops.higher_order.scan
        last, forwards = scan(_step, [h[0]], [rows[:, :, 0]], (w[0], bias[0]))
        first, backwards = scan(_step, [h[1]], [rows[:, :, 1].flip(0)], (w[1], bias[1]))
        y, h_n = torch.stack([forwards, backwards.flip(0)], 2), torch.stack([last, first])
    # Gates are for a backward pass, which a program for inference has none of.
    return y.to(gi.dtype), h_n.to(gi.dtype), gi.new_empty(0)


def _step(h: Tensor, i: Tensor, w: Tensor, bias: Tensor) -> list[Tensor]:
    """Runs one time step of one direction; returns the state (B, H) for a scan to carry, and again to keep."""
    hidden = h.shape[1]
    gh = h @ w.T
    r, z = torch.sigmoid(i[:, : 2 * hidden] + gh[:, : 2 * hidden]).chunk(2, 1)
    n = torch.tanh(i[:, 2 * hidden :] + r * (gh[:, 2 * hidden :] + bias))
    h = n + z * (h - n)
    return [h, h.clone()]


def writes_onnx() -> bool:
    """Returns whether torch.export runs inside torch.onnx.export."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def onnx_gru_layer(
    x: Tensor, h0: Tensor, weights: Sequence[Tensor], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Writes one layer as ONNX's GRU operator into the graph of `torch.onnx.export`; nothing is computed.

    Args:
        x: (T, B, I) input.
        h0: (2, B, H) initial states.
        weights: w_ih, w_hh and, with biases, b_ih, b_hh of the first direction, then of the second.
        lengths: (B,) time steps of each sequence.

    Returns:
        y (T, B, 2H), zero past each sequence's end, and h_n (2, B, H).
    """
    hidden = h0.shape[2]
    w, r, bias = onnx_weights(weights)
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "GRU",
        [x, w, r, bias, None if lengths is None else lengths.to(torch.int32), h0],
        {"direction": "bidirectional", "hidden_size": hidden, "linear_before_reset": 1},
        dtypes=[x.dtype, x.dtype],
        shapes=[(x.shape[0], 2, x.shape[1], hidden), h0.shape],
    )
    y = y.transpose(1, 2).flatten(2)
    if lengths is not None:
        y = y * (torch.arange(x.shape[0], device=x.device)[:, None] < lengths)[:, :, None]
    return y, h_n


def onnx_recurrence(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, precision: str, save: bool, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes `bigru::gru_forward` as ONNX's GRU operator, one a direction, into what is traced.

    The input product is already in the program, and gi takes the place of the input: the operator multiplies it with 1.
    """
    steps, batch, _, gates = gi.shape
    hidden = gates // 3
    w = gates_zrh(torch.eye(gates, dtype=gi.dtype, device=gi.device))[None]
    ys, states = [], []
    for d, direction in enumerate(("forward", "reverse")):
        bias = None
        if b_hn is not None:
            # Of b_ih and b_hh, in z, r, h, all but b_hn is in gi.
            bias = torch.cat([gi.new_zeros(gates + 2 * hidden), b_hn[d]])[None]
        y, h_n = torch.onnx.ops.symbolic_multi_out(
            "GRU",
            [gi[:, :, d], w, gates_zrh(w_hh[d])[None], bias, None, h0[d : d + 1]],
            {"direction": direction, "hidden_size": hidden, "linear_before_reset": 1},
            dtypes=[gi.dtype, gi.dtype],
            shapes=[(steps, 1, batch, hidden), (1, batch, hidden)],
        )
        ys.append(y)
        states.append(h_n)
    return torch.cat(ys, 1).transpose(1, 2), torch.cat(states), gi.new_empty(0)


def onnx_weights(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns a layer's weights as ONNX's GRU takes them: w (2, 3H, I), r (2, 3H, H) and, with biases, (2, 6H).

    Gates are in the order z, r, h; `weights` are as for `onnx_gru_layer`.
    """
    half = len(weights) // 2
    w, r, *biases = (torch.stack([gates_zrh(weights[d + k]) for d in (0, half)]) for k in range(half))
    return w, r, torch.cat(biases, 1) if biases else None


def gates_zrh(weight: Tensor) -> Tensor:
    """(3H, ...) rows in torch's order r, z, n to ONNX's z, r, h."""
    r, z, n = weight.chunk(3)
    return torch.cat([z, r, n])
