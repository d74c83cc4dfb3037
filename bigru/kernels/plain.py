"""The recurrence and its gradient as two loops in plain PyTorch, both directions at once, for inside an operator.

They serve compilers where no fused kernel can: a compiler that looked into ATen's GRU, or into the reference, would
unroll time, and compile and keep a graph for every length. The equations are in `bigru.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gru_forward(
    gi: Tensor,  # (T, B, D, 3H)
    w_hh: Tensor,  # (D, 3H, H)
    b_hn: Tensor | None,  # (D, H)
    h0: Tensor,  # (D, B, H)
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, B, D, H), h_n (D, B, H) and, for the backward pass if `save`, the gates (T, B, D, 4, H), else empty."""
    gi_s, w, h = _in_steps(gi), _wide(w_hh).mT, _wide(h0)
    hidden = h.shape[2]
    bias = h.new_zeros(()) if b_hn is None else _wide(b_hn).unsqueeze(1)
    y = gi_s.new_empty(*gi_s.shape[:3], hidden)
    gates = gi_s.new_empty(*gi_s.shape[:3], 4, hidden) if save else gi_s.new_empty(0)
    for s, i in enumerate(gi_s.unbind()):
        gh = torch.bmm(h, w)
        rz = torch.sigmoid(i[..., : 2 * hidden] + gh[..., : 2 * hidden])
        r, z = rz.chunk(2, -1)
        q = gh[..., 2 * hidden :] + bias
        n = torch.tanh(torch.addcmul(i[..., 2 * hidden :], r, q))
        h = torch.lerp(n, h, z, out=y[s])
        if save:
            torch.stack((r, z, n, q), 2, out=gates[s])
    return _in_time(y, gi), h.to(h0.dtype, copy=True), _in_time(gates, gi) if save else gates.to(gi.dtype)


def gru_backward(
    dy: Tensor,  # (T, B, D, H)
    dh_n: Tensor,  # (D, B, H)
    y: Tensor,  # (T, B, D, H)
    gates: Tensor,  # (T, B, D, 4, H)
    h0: Tensor,  # (D, B, H)
    w_hh: Tensor,  # (D, 3H, H)
) -> tuple[Tensor, Tensor, Tensor]:
    """dgi (T, B, D, 3H), gradient of the gates' input side; dq (T, B, D, H), gradient of q; dh0 (D, B, H)."""
    dy_s, dh, w = _in_steps(dy), _wide(dh_n), _wide(w_hh)
    r, z, n, q = _in_steps(gates).unbind(3)
    before = torch.cat((_wide(h0).unsqueeze(0), _in_steps(y)[:-1]))
    # What each step multiplies its dh with: all steps at once.
    by_n, by_z, by_r = (1 - z) * (1 - n * n), (before - n) * z * (1 - z), q * r * (1 - r)
    dgh = dy_s.new_empty(*dy_s.shape[:3], 3 * dy_s.shape[3])
    dn = torch.empty_like(dy_s)
    for s in reversed(range(len(dy_s))):
        dh = dh + dy_s[s]
        torch.mul(dh, by_n[s], out=dn[s])
        torch.cat((dn[s] * by_r[s], dh * by_z[s], dn[s] * r[s]), -1, out=dgh[s])
        dh = torch.baddbmm(dh * z[s], dgh[s], w)
    hidden = dn.shape[3]
    dgi = torch.cat((dgh[..., : 2 * hidden], dn), -1)
    return _in_time(dgi, y), _in_time(dgh[..., 2 * hidden :], y), dh.to(h0.dtype, copy=True)


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least: what is stored in 16 bits is not summed in them."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _in_steps(tensor: Tensor) -> Tensor:
    """(T, B, D, ...) in time to (T, D, B, ...) in each direction's own steps."""
    forwards, backwards = _wide(tensor).unbind(2)
    return torch.stack((forwards, backwards.flip(0)), 1)


def _in_time(tensor: Tensor, like: Tensor) -> Tensor:
    """(T, D, B, ...) in steps to (T, B, D, ...) in time, of the dtype of `like`."""
    forwards, backwards = tensor.to(like.dtype).unbind(1)
    return torch.stack((forwards, backwards.flip(0)), 2)
