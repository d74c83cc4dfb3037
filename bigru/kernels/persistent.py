"""The Triton kernels whose recurrent weights are persistent: loaded once, and on chip for the whole sequence.

Both directions run in one launch: one program per block of batch rows and direction, with the time loop inside and the
state in registers. Matrix products are transposed, gates^T[H, N] = W_hh[H, H] @ h^T[H, N], so that a small batch block
N still fills the tensor cores: hidden units are the long side.

Each kernel also takes a batch of sequences of different lengths as a PackedSequence lays it out: P rows, step by step,
where step t has rows only for the sequences longer than t, the longest first; (T, B, ...) below then means (P, ...).
`varlen_ptr` holds each sequence's length and each step's first row. A program makes as many steps as its longest
sequence has; a sequence without a row at a step keeps its state, or its gradient, so that direction 1 starts at each
sequence's own end. Where `varlen_ptr` is None nothing of this is compiled.

Pointers are to the operands that `bigru.kernels.kernel` describes, `varlen_ptr` is to `Varlen.table` or None. b_hn is
not touched unless HAS_BIAS, the gates not unless SAVE. HP is H padded to a power of two, N the rows of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigru.kernels.cell import (
    SIZES,
    _cell,
    _cell_backward,
    _extent,
    _load_gates_in,
    _load_saved,
    _load_weights,
    _peak,
    _present,
    _product,
    _row,
    _store_gate_gradients,
    _store_gates,
)


@triton.jit
def _load_gates_weights(w, mask, H: tl.constexpr, SPLIT: tl.constexpr):
    w_r = _load_weights(w, mask, SPLIT)
    w_z = _load_weights(w + H * H, mask, SPLIT)
    return w_r, w_z, _load_weights(w + 2 * H * H, mask, SPLIT)


@triton.jit(do_not_specialize=SIZES)
def gru_forward_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, h0_ptr, y_ptr, h_n_ptr, gates_ptr, varlen_ptr, T, B, H: tl.constexpr, HP: tl.constexpr,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,
):  # fmt: skip
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    j = tl.arange(0, HP)[:, None]
    k = tl.arange(0, HP)[None, :]
    b = tl.arange(0, N)[None, :]
    mask = (j < H) & (b0 + b < B)
    w_r, w_z, w_n = _load_gates_weights(w_hh_ptr + d * (3 * H * H) + j * H + k, (j < H) & (k < H), H, SPLIT)
    b_hn = tl.zeros([HP, 1], tl.float32)
    if HAS_BIAS:
        b_hn = tl.load(b_hn_ptr + d * H + j, j < H, 0.0).to(tl.float32)

    offs_gi = b * (2 * 3 * H) + j
    offs_y = b * (2 * H) + j
    offs_gates = b * (2 * 4 * H) + j
    offs_h = (d.to(tl.int64) * B + b0) * H + b * H + j
    h = tl.load(h0_ptr + offs_h, mask, 0.0).to(tl.float32)
    if SPLIT:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        h_peak = tl.maximum(_peak(h, 0), 1.0)[None, :]
        h_scale = 1024.0 / h_peak
        unscale = h_peak * (1.0 / (1024.0 * 1024.0))

    extent, start = _extent(varlen_ptr, b0, b, T, B)
    t = d * (T - 1 - start)
    step = 1 - 2 * d
    row = _row(varlen_ptr, t, b0, d, T, B)
    present = mask
    if varlen_ptr is not None:
        row_next = _row(varlen_ptr, t + step, b0, d, T, B)
        present = (j < H) & (t < extent)
    i_r, i_z, i_n = _load_gates_in(gi_ptr, row, offs_gi, present, H)
    for s in range(start, T):
        # The next step's input gates are asked for before this step's products, which hide their latency. Where they
        # lie was asked for a step earlier still.
        mask_next = (j < H) & _present(varlen_ptr, extent, t + step, b, s + 1 < T)
        if varlen_ptr is None:
            row_next = _row(varlen_ptr, t + step, b0, d, T, B)
        else:
            row_after = _row(varlen_ptr, t + 2 * step, b0, d, T, B)
        next_r, next_z, next_n = _load_gates_in(gi_ptr, row_next, offs_gi, mask_next, H)
        zero = tl.zeros([HP, N], tl.float32)
        x = h
        if SPLIT:
            x = h * h_scale
        h_r = _product(w_r, x, zero, SPLIT, PRECISION)
        h_z = _product(w_z, x, zero, SPLIT, PRECISION)
        q = _product(w_n, x, zero, SPLIT, PRECISION)
        if SPLIT:
            h_r *= unscale * w_r[2]
            h_z *= unscale * w_z[2]
            q *= unscale * w_n[2]
        q += b_hn
        r, z, n, h_new = _cell(i_r, i_z, i_n, h_r, h_z, q, h, ACCURATE)
        if varlen_ptr is None:
            h = h_new
            row = _row(varlen_ptr, t, b0, d, T, B)
        else:
            present = (j < H) & (t < extent)
            h = tl.where(t < extent, h_new, h)
        tl.store(y_ptr + row * H + offs_y, h, present)
        if SAVE:
            _store_gates(gates_ptr, row, offs_gates, present, r, z, n, q, H)
        i_r, i_z, i_n = next_r, next_z, next_n
        if varlen_ptr is not None:
            row, row_next = row_next, row_after
        t += step
    tl.store(h_n_ptr + offs_h, h, mask)


@triton.jit(do_not_specialize=SIZES)
def gru_backward_kernel(
    dy_ptr, dh_n_ptr, y_ptr, gates_ptr, h0_ptr, w_hh_ptr, dgi_ptr, dq_ptr, dh0_ptr, varlen_ptr, h_prev_ptr, T, B,
    H: tl.constexpr, HP: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    i = tl.arange(0, HP)[:, None]
    k = tl.arange(0, HP)[None, :]
    b = tl.arange(0, N)[None, :]
    mask = (i < H) & (b0 + b < B)
    # Transposed: element (i, k) of the operand is w_hh[gate, k, i].
    w_r, w_z, w_n = _load_gates_weights(w_hh_ptr + d * (3 * H * H) + k * H + i, (i < H) & (k < H), H, SPLIT)

    offs_gi = b * (2 * 3 * H) + i
    offs_y = b * (2 * H) + i
    offs_h = (d.to(tl.int64) * B + b0) * H + b * H + i
    dh = tl.load(dh_n_ptr + offs_h, mask, 0.0).to(tl.float32)
    w_peak = 1.0
    if SPLIT:
        w_peak = tl.maximum(tl.maximum(w_r[2], w_z[2]), w_n[2])

    extent, start = _extent(varlen_ptr, b0, b, T, B)
    t = (1 - d) * (T - 1 - start)
    step = 2 * d - 1
    present = mask
    row, row_next, row_after = None, None, None
    if varlen_ptr is not None:
        row = _row(varlen_ptr, t, b0, d, T, B)
        row_next = _row(varlen_ptr, t + step, b0, d, T, B)
        row_after = row_next
    dy, r, z, n, q, h_prev = _load_saved(
        dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row, row_next, t, start, T, b0, d, i, b, extent, B, H
    )  # fmt: skip
    for s in range(start, T):
        da_r, da_z, da_n, dq = _cell_backward(dh + dy, r, z, n, q, h_prev)
        dh = (dh + dy) * z
        if varlen_ptr is not None:
            row_after = _row(varlen_ptr, t + 2 * step, b0, d, T, B)
            present = (i < H) & (t < extent)
            tl.store(h_prev_ptr + row * H + offs_y, h_prev, present)
        # The next step's operands are asked for before this step's products, which hide their latency.
        dy, r, z, n, q, h_prev = _load_saved(
            dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row_next, row_after, t + step, s + 1, T, b0, d, i, b,
            extent, B, H,
        )  # fmt: skip
        if SPLIT:
            # Gradients have no bound, so each batch row is scaled by its own largest one.
            a_peak = _peak(tl.maximum(tl.maximum(tl.abs(da_r), tl.abs(da_z)), tl.abs(dq)), 0)[None, :]
            # The three products add up in one accumulator, so all carry the scale 1024 / w_peak * 1024 / a_peak.
            scale = 1024.0 / a_peak
            acc = tl.zeros([HP, N], tl.float32)
            acc = _product(w_r, da_r * (scale * (w_r[2] / w_peak)), acc, SPLIT, PRECISION)
            acc = _product(w_z, da_z * (scale * (w_z[2] / w_peak)), acc, SPLIT, PRECISION)
            acc = _product(w_n, dq * (scale * (w_n[2] / w_peak)), acc, SPLIT, PRECISION)
            dh += acc * (a_peak * (w_peak * (1.0 / (1024.0 * 1024.0))))
        else:
            dh = _product(w_r, da_r, dh, SPLIT, PRECISION)
            dh = _product(w_z, da_z, dh, SPLIT, PRECISION)
            dh = _product(w_n, dq, dh, SPLIT, PRECISION)
        stored = _row(varlen_ptr, t, b0, d, T, B) if varlen_ptr is None else row
        _store_gate_gradients(dgi_ptr, dq_ptr, stored, offs_gi, offs_y, present, da_r, da_z, da_n, dq, H)
        if varlen_ptr is not None:
            row, row_next = row_next, row_after
        t += step
    tl.store(dh0_ptr + offs_h, dh, mask)
