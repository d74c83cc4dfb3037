"""The GRU recurrence as one plain PyTorch loop: the truth that every other implementation is held to.

For one direction, with gates in the order r, z, n of `torch.nn.GRU`
(https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html):

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    q = W_hn h + b_hn
    n = tanh(W_in x + b_in + r * q)
    h' = n + z * (h - n)

The input side of the gates, `gi`, holds everything that does not depend on h: W_i x + b_i, plus b_hr and b_hz.
b_hn stays apart, since r multiplies it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_operands(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the recurrence's operands for one layer, in operators that autograd and compilers see through.

    Args:
        x: (T, B, I) input; packed, (P, I).
        weights: w_ih (3H, I), w_hh (3H, H) and, with biases, b_ih (3H), b_hh (3H), of the first direction, then of the
            second: the order of `torch.nn.GRU`.

    Returns:
        gi (T, B, D, 3H), of x's dtype, w_hh (D, 3H, H) and b_hn (D, H), as `gru_recurrence` takes them.
    """
    half = len(weights) // 2
    w_ih, w_hh, *biases = (torch.stack(pair) for pair in zip(weights[:half], weights[half:], strict=True))
    directions, gates, hidden = w_hh.shape
    bias, b_hn = None, None
    if biases:
        b_ih, b_hh = biases
        bias = torch.cat([b_ih[:, : 2 * hidden] + b_hh[:, : 2 * hidden], b_ih[:, 2 * hidden :]], dim=1).flatten()
        b_hn = b_hh[:, 2 * hidden :]
    # One matrix product for all gates of both directions.
    gi = torch.nn.functional.linear(x, w_ih.flatten(0, 1), bias)
    return gi.unflatten(-1, (directions, gates)), w_hh, b_hn


def gru_recurrence(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, batch_sizes: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over time, direction 0 forwards and direction 1 backwards.

    Differentiable to any order, on any device and in any floating dtype; state and arithmetic are of the inputs' dtype.

    Args:
        gi: (T, B, D, 3H) input side of the gates, from `layer_operands`.
        w_hh: (D, 3H, H) recurrent weights.
        b_hn: (D, H) recurrent bias of n, or None.
        h0: (D, B, H) initial state.
        batch_sizes: for packed sequences, the number of rows at each step, never rising: step t has rows for the first
            batch_sizes[t] sequences only. gi is then (P, D, 3H), and (T, B, ...) below means (P, ...).

    Returns:
        y (T, B, D, H), every state, and h_n (D, B, H), the last state of each direction.
    """
    by_step = gi if batch_sizes is None else gi.split(list(batch_sizes))
    join = torch.stack if batch_sizes is None else torch.cat
    steps = len(by_step)
    ys, h_n = [], []
    for d in range(gi.shape[-2]):
        h = h0[d]
        y_d: list[Tensor] = [h] * steps
        for s in range(steps):
            t = s if d == 0 else steps - 1 - s
            i_r, i_z, i_n = by_step[t][:, d].chunk(3, dim=-1)
            if batch_sizes is not None:
                # Sequences without a row at this step wait.
                h, waiting = h.tensor_split([batch_sizes[t]])
            h_r, h_z, q = (h @ w_hh[d].T).chunk(3, dim=-1)
            if b_hn is not None:
                q = q + b_hn[d]
            r = torch.sigmoid(i_r + h_r)
            z = torch.sigmoid(i_z + h_z)
            n = torch.tanh(i_n + r * q)
            h = n + z * (h - n)
            y_d[t] = h
            if batch_sizes is not None:
                h = torch.cat([h, waiting])
        ys.append(join(y_d))
        h_n.append(h)
    return torch.stack(ys, dim=-2), torch.stack(h_n)
