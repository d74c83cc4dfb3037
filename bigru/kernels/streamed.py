"""The Triton kernels whose recurrent weights are streamed, for W_hh that does not fit on chip.

As in `bigru.kernels.persistent`, but blocks of W_hh are read at every step (from the L2 cache, as a rule), and the
state passes from step to step through a small fp32 buffer that only its own program touches: `state_ptr`,
(2, D, B, H), which holds h0 twice on entry and h_n in [T % 2] on return, or `dh_ptr`, (D, B, H), dh_n on entry and dh0
on return. BH is the size of a block of hidden units; `hidden` is H once more, since loops bounded by a constant would
be unrolled, and their values spilled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigru.kernels.cell import (
    SIZES,
    _cell,
    _cell_backward,
    _dot,
    _extent,
    _load_gates_in,
    _load_saved,
    _row,
    _store_gate_gradients,
    _store_gates,
)


@triton.jit
def _add_product(w, mask, x, acc, PRECISION: tl.constexpr):
    w = tl.load(w, mask, 0.0)
    return _dot(w, x.to(w.dtype), acc, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def gru_forward_streamed_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, state_ptr, y_ptr, gates_ptr, varlen_ptr, T, B, hidden, H: tl.constexpr,
    BH: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,
):  # fmt: skip
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    rows = tl.arange(0, BH)[:, None]
    columns = tl.arange(0, BH)[None, :]
    b = tl.arange(0, N)[None, :]
    mask_b = b0 + b < B
    w_ptr = w_hh_ptr + d.to(tl.int64) * (3 * H * H)
    state_ptr += (d.to(tl.int64) * B + b0) * H
    half = B.to(tl.int64) * (2 * H)

    extent, start = _extent(varlen_ptr, b0, b, T, B)
    present = mask_b
    t = d * (T - 1 - start)
    # The steps left out come first, so that the last one leaves the state in the same half whatever their number.
    for s in range(start, T):
        row = _row(varlen_ptr, t, b0, d, T, B)
        if varlen_ptr is not None:
            present = t < extent
        h_ptr = state_ptr + (s % 2) * half + b * H
        for j0 in range(0, hidden, BH):
            offs_j = j0 + rows
            mask = (offs_j < H) & present
            i_r, i_z, i_n = _load_gates_in(gi_ptr, row, b * (2 * 3 * H) + offs_j, mask, H)
            h_r = tl.zeros([BH, N], tl.float32)
            h_z = tl.zeros([BH, N], tl.float32)
            q = tl.zeros([BH, N], tl.float32)
            for k0 in range(0, hidden, BH):
                h_k = tl.load(h_ptr + k0 + rows, (k0 + rows < H) & mask_b, 0.0)
                w = w_ptr + offs_j * H + k0 + columns
                mask_w = (offs_j < H) & (k0 + columns < H)
                h_r = _add_product(w, mask_w, h_k, h_r, PRECISION)
                h_z = _add_product(w + H * H, mask_w, h_k, h_z, PRECISION)
                q = _add_product(w + 2 * H * H, mask_w, h_k, q, PRECISION)
            if HAS_BIAS:
                q += tl.load(b_hn_ptr + d * H + offs_j, offs_j < H, 0.0).to(tl.float32)
            mask_h = (offs_j < H) & mask_b
            h = tl.load(h_ptr + offs_j, mask_h, 0.0)
            r, z, n, h_new = _cell(i_r, i_z, i_n, h_r, h_z, q, h, ACCURATE)
            h = h_new if varlen_ptr is None else tl.where(present, h_new, h)
            tl.store(state_ptr + ((s + 1) % 2) * half + b * H + offs_j, h, mask_h)
            tl.store(y_ptr + row * H + b * (2 * H) + offs_j, h, mask)
            if SAVE:
                _store_gates(gates_ptr, row, b * (2 * 4 * H) + offs_j, mask, r, z, n, q, H)
        # The next step reads what other threads of this program have just written.
        tl.debug_barrier()
        t += 1 - 2 * d


@triton.jit(do_not_specialize=SIZES)
def gru_backward_streamed_kernel(
    dy_ptr, y_ptr, gates_ptr, h0_ptr, w_hh_ptr, dh_ptr, dgi_ptr, dq_ptr, varlen_ptr, h_prev_ptr, T, B, hidden,
    H: tl.constexpr, BH: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    rows = tl.arange(0, BH)[:, None]
    columns = tl.arange(0, BH)[None, :]
    b = tl.arange(0, N)[None, :]
    mask_b = b0 + b < B
    w_ptr = w_hh_ptr + d.to(tl.int64) * (3 * H * H)
    dh_ptr += (d.to(tl.int64) * B + b0) * H + b * H

    extent, start = _extent(varlen_ptr, b0, b, T, B)
    present = mask_b
    t = (1 - d) * (T - 1 - start)
    for s in range(start, T):
        row = _row(varlen_ptr, t, b0, d, T, B)
        row_prev = _row(varlen_ptr, t + 2 * d - 1, b0, d, T, B)
        if varlen_ptr is not None:
            present = t < extent
        for i0 in range(0, hidden, BH):
            offs_i = i0 + rows
            mask = (offs_i < H) & mask_b
            offs_y = b * (2 * H) + offs_i
            dy, r, z, n, q, h_prev = _load_saved(
                dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row, row_prev, t, s, T, b0, d, offs_i, b, extent, B, H
            )
            dh = tl.load(dh_ptr + offs_i, mask, 0.0) + dy
            da_r, da_z, da_n, dq = _cell_backward(dh, r, z, n, q, h_prev)
            tl.store(dh_ptr + offs_i, dh * z, mask)
            offs_gi = b * (2 * 3 * H) + offs_i
            mask_row = (offs_i < H) & present
            _store_gate_gradients(dgi_ptr, dq_ptr, row, offs_gi, offs_y, mask_row, da_r, da_z, da_n, dq, H)
            if varlen_ptr is not None:
                tl.store(h_prev_ptr + row * H + offs_y, h_prev, mask_row)
        # Each block of dh needs the gate gradients of all hidden units, which other threads have just written.
        tl.debug_barrier()
        for i0 in range(0, hidden, BH):
            offs_i = i0 + rows
            mask = (offs_i < H) & mask_b
            dh = tl.load(dh_ptr + offs_i, mask, 0.0)
            for k0 in range(0, hidden, BH):
                offs_k = k0 + rows
                mask_k = (offs_k < H) & present
                w = w_ptr + (k0 + columns) * H + offs_i
                mask_w = (offs_i < H) & (k0 + columns < H)
                dgi = dgi_ptr + row * (3 * H) + b * (2 * 3 * H) + offs_k
                dh = _add_product(w, mask_w, tl.load(dgi, mask_k, 0.0), dh, PRECISION)
                dh = _add_product(w + H * H, mask_w, tl.load(dgi + H, mask_k, 0.0), dh, PRECISION)
                dq = tl.load(dq_ptr + row * H + b * (2 * H) + offs_k, mask_k, 0.0)
                dh = _add_product(w + 2 * H * H, mask_w, dq, dh, PRECISION)
            tl.store(dh_ptr + offs_i, dh, mask)
        tl.debug_barrier()
        t += 2 * d - 1
