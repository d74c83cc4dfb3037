"""The recurrence and its gradient as two loops in PyTorch, both directions at once, for inside an operator.

They serve compilers where no fused kernel can: a compiler that looked into ATen's GRU, or into the reference, would
unroll time, and compile and keep a graph for every length. The equations are in `bigru.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigru.kernels.config import Call
from bigru.kernels.kernel import Backward, Forward, Kernel


class ScanKernel(Kernel):
    """Serves every device and floating dtype, but no sequences of different lengths."""

    name = "scan"

    def refusal(self, call: Call) -> str | None:
        return "the input is a PackedSequence" if call.varlen else None

    def forward(self, operands: Forward, config: None) -> None:
        gi, w_hh, b_hn, h0, y, h_n, gates, *_ = operands
        gi_s, w, h = _in_steps(gi), _wide(w_hh).mT, _wide(h0)
        hidden = h.shape[2]
        bias = h.new_zeros(()) if b_hn is None else _wide(b_hn).unsqueeze(1)
        y_s = gi_s.new_empty(*gi_s.shape[:3], hidden)
        gates_s = gi_s.new_empty(*gi_s.shape[:3], 4, hidden) if gates is not None else None
        for s, i in enumerate(gi_s.unbind()):
            gh = torch.bmm(h, w)
            rz = torch.sigmoid(i[..., : 2 * hidden] + gh[..., : 2 * hidden])
            r, z = rz.chunk(2, -1)
            q = gh[..., 2 * hidden :] + bias
            n = torch.tanh(torch.addcmul(i[..., 2 * hidden :], r, q))
            h = torch.lerp(n, h, z, out=y_s[s])
            if gates_s is not None:
                torch.stack((r, z, n, q), 2, out=gates_s[s])
        _in_time(y_s, y)
        h_n.copy_(h)
        if gates is not None and gates_s is not None:
            _in_time(gates_s, gates)

    def backward(self, operands: Backward, config: None) -> None:
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, *_ = operands
        dy_s, dh, w = _in_steps(dy), _wide(dh_n), _wide(w_hh)
        r, z, n, q = _in_steps(gates).unbind(3)
        h_prev = torch.cat((_wide(h0).unsqueeze(0), _in_steps(y)[:-1]))
        # What each step multiplies its dh with: all steps at once.
        by_n, by_z, by_r = (1 - z) * (1 - n * n), (h_prev - n) * z * (1 - z), q * r * (1 - r)
        dgh = dy_s.new_empty(*dy_s.shape[:3], 3 * dy_s.shape[3])
        dn = torch.empty_like(dy_s)
        for s in reversed(range(len(dy_s))):
            dh = dh + dy_s[s]
            torch.mul(dh, by_n[s], out=dn[s])
            torch.cat((dn[s] * by_r[s], dh * by_z[s], dn[s] * r[s]), -1, out=dgh[s])
            dh = torch.baddbmm(dh * z[s], dgh[s], w)
        hidden = dn.shape[3]
        _in_time(torch.cat((dgh[..., : 2 * hidden], dn), -1), dgi)
        _in_time(dgh[..., 2 * hidden :], dq)
        dh0.copy_(dh)


KERNEL = ScanKernel()


def _wide(tensor: Tensor) -> Tensor:
    """Returns a tensor in fp32 at least: numbers that are stored in 16 bits are not summed in them."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _in_steps(tensor: Tensor) -> Tensor:
    """Returns (T, B, D, ...) in time as (T, D, B, ...) in each direction's own steps."""
    forwards, backwards = _wide(tensor).unbind(2)
    return torch.stack((forwards, backwards.flip(0)), 1)


def _in_time(tensor: Tensor, out: Tensor) -> None:
    """Writes (T, D, B, ...) in steps to (T, B, D, ...) in time, of the dtype of `out`."""
    forwards, backwards = tensor.to(out.dtype).unbind(1)
    torch.stack((forwards, backwards.flip(0)), 2, out=out)
