"""A second look at what scaled fp16 products made of the caller's own initial states.

The kernels that multiply fp32 numbers as scaled fp16 parts scale a sequence's states by its largest initial one, which
bounds them all: two parts keep fp32's mantissa within 2^-12 of it. Where that state is forgotten, what is left of the
others may lie below. An infinite weight has no second part, which makes its unit NaN, where the product with a state
other than zero is an infinity and the gate stays finite.

Which states come is data, of which the host knows nothing without waiting for the GPU. So one more launch looks: a
program for each sequence and direction, which ends at once unless an initial state exceeds LIMIT or a last one is NaN.
Else it computes the sequence anew in fp32, with the same results as exact kernels would have: slower by far, and rare.
(Estimated, not measured: a launch and the reading of h0 and h_n, some microseconds a layer.) Where no initial state is
given all of this is left out: zeros need no scale, and times an infinity they are NaN in torch.nn.GRU too.

Pointers are to the operands that `bigru.kernels.kernel` describes, `varlen_ptr` to `Varlen.table` or None, `b_hn_ptr`
and `gates_ptr` None where there are none. The numbers of one unit's gates lie `gate` apart, those of one gate `unit`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bigru.kernels.cell import SIZES, _cell, _row
from bigru.kernels.config import TritonConfig
from bigru.kernels.kernel import Forward
from bigru.kernels.launch import Launcher
from bigru.kernels.varlen import steps_and_table

LIMIT = tl.constexpr(4096.0)
"""Largest initial state beside which states of size 1 keep fp32's mantissa."""
CONFIG = TritonConfig(False, rows=1, block_hidden=128, num_warps=4, split=False, dot="ieee")
UNITS, COLUMNS = tl.constexpr(8), tl.constexpr(CONFIG.block_hidden)
"""One block of W_hh."""


@triton.jit(do_not_specialize=(*SIZES, "H", "unit", "gate"))
def gru_mend_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, h0_ptr, y_ptr, h_n_ptr, gates_ptr, varlen_ptr, T, B, H, unit, gate
):  # fmt: skip
    b, d = tl.program_id(0), tl.program_id(1)
    j, k = tl.arange(0, UNITS), tl.arange(0, COLUMNS)[None, :]
    w_ptr = w_hh_ptr + d.to(tl.int64) * (3 * H * H)
    h_ptr = h0_ptr + (d.to(tl.int64) * B + b) * H
    h_n_ptr += (d.to(tl.int64) * B + b) * H
    wrong = 0
    for k0 in range(0, H, COLUMNS):
        h0 = tl.load(h_ptr + k0 + k, k0 + k < H, 0.0)
        h_n = tl.load(h_n_ptr + k0 + k, k0 + k < H, 0.0)
        wrong |= tl.max(((tl.abs(h0) > LIMIT) | (h_n != h_n)).to(tl.int32))
    steps = T
    if varlen_ptr is not None:
        steps = tl.load(varlen_ptr + b).to(tl.int32)
    steps *= wrong
    t = d * (steps - 1)
    for _ in range(steps):
        row = _row(varlen_ptr, t, b, d, T, B)
        for j0 in range(0, H, UNITS):
            a_r = tl.zeros([UNITS, COLUMNS], tl.float32)
            a_z = tl.zeros([UNITS, COLUMNS], tl.float32)
            a_n = tl.zeros([UNITS, COLUMNS], tl.float32)
            for k0 in range(0, H, COLUMNS):
                h = tl.load(h_ptr + k0 + k, k0 + k < H, 0.0)
                w = w_ptr + (j0 + j[:, None]) * H + k0 + k
                mask_w = (j0 + j[:, None] < H) & (k0 + k < H)
                a_r += tl.load(w, mask_w, 0.0) * h
                a_z += tl.load(w + H * H, mask_w, 0.0) * h
                a_n += tl.load(w + 2 * H * H, mask_w, 0.0) * h
            i = j0 + j
            mask = i < H
            q = tl.sum(a_n, 1)
            if b_hn_ptr is not None:
                q += tl.load(b_hn_ptr + d * H + i, mask, 0.0)
            gi = gi_ptr + row * (3 * H) + i
            i_r, i_z = tl.load(gi, mask, 0.0), tl.load(gi + H, mask, 0.0)
            i_n, h = tl.load(gi + 2 * H, mask, 0.0), tl.load(h_ptr + i, mask, 0.0)
            r, z, n, h = _cell(i_r, i_z, i_n, tl.sum(a_r, 1), tl.sum(a_z, 1), q, h, True)
            tl.store(y_ptr + row * H + i, h, mask)
            tl.store(h_n_ptr + i, h, mask)  # the last one stays
            if gates_ptr is not None:
                gates = gates_ptr + row * (4 * H) + i * unit
                tl.store(gates, r, mask)
                tl.store(gates + gate, z, mask)
                tl.store(gates + 2 * gate, n, mask)
                tl.store(gates + 3 * gate, q, mask)
        # The next step reads what other threads of this program have just written.
        tl.debug_barrier()
        h_ptr = y_ptr + row * H
        t += 1 - 2 * d


LAUNCHER = Launcher(gru_mend_kernel)


class Mended(NamedTuple):
    """Which pointers there are; the kernel's configuration."""

    biased: bool
    saved: bool

    def constants(self) -> dict[str, Any]:
        """Returns the kernel's compile-time arguments."""
        return {}

    def options(self) -> dict[str, Any]:
        """Returns the compiler's options."""
        return CONFIG.options()


def mend(operands: Forward, gates_innermost: bool = False) -> None:
    """Computes anew, in a forward pass with scaled products, the sequences that these got wrong.

    Nothing is launched for zeros that stand for no initial state, nor for 16-bit storage, which is not scaled.

    Args:
        operands: those of the forward pass, which has been launched.
        gates_innermost: whether the gates are (T, B, D, H, 4) instead of (T, B, D, 4, H).
    """
    gi, w_hh, b_hn, h0, y, h_n, gates, varlen, given = operands
    if not given or gi.dtype != torch.float32:
        return
    directions, batch, hidden = h0.shape
    steps, table = steps_and_table(y, varlen)
    unit, gate = (4, 1) if gates_innermost else (1, hidden)
    launch = LAUNCHER.prepare(
        Mended(b_hn is not None, gates is not None), varlen is not None, gi.dtype, gi.get_device()
    )  # fmt: skip
    tensors = gi, w_hh, b_hn, h0, y, h_n, gates, table
    launch((batch, directions, 1), tensors, (steps, batch, hidden, unit, gate))
