"""The recurrence as Triton kernels, forward and backward, for any GPU that Triton runs on and for its interpreter.

Both directions run in one launch: one program per block of batch rows and direction, with the time loop inside.
Matrix products are transposed, gates^T[H, N] = W_hh[H, H] @ h^T[H, N], so that a small batch block N still fills the
tensor cores: hidden units are the long side.

Two forms of each kernel share their arithmetic: *whole*, here, where W_hh is loaded once and stays on chip, and the
state stays in registers for the whole sequence; and *blocked*, in `bigru.kernels.blocked`, for W_hh that does not fit.

State, accumulation and all element-wise arithmetic are fp32 whatever the storage. Offsets inside one time step are
32-bit, the step's own offset is 64-bit.

Each kernel also takes a ragged batch as a PackedSequence lays it out: P rows, step by step, where step t has rows only
for the sequences longer than t, the longest first; (T, B, ...) below then means (P, ...). `packing_ptr` holds each
sequence's length and each step's first row. A program makes as many steps as its longest sequence has; a sequence
without a row at a step keeps its state, or its gradient, so that direction 1 starts at each sequence's own end. Where
`packing_ptr` is None nothing of this is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bf16 as if it were integers (triton 3.6 to 3.9); there, operands are widened first, which
# changes nothing: products of two bf16 or fp16 numbers are exact in fp32.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)

SIZES = ("T", "B")
"""Arguments that a kernel is not compiled anew for: left to itself, Triton does so for 1 and for multiples of 16."""


@triton.jit
def _tanh(x, ACCURATE: tl.constexpr):
    # 2 sigmoid(2x) - 1 never divides infinities; near zero it cancels, so the accurate form takes the series there.
    y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    if ACCURATE:
        s = x * x
        near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
        y = tl.where(s < 0.09, near, y)
    return y


@triton.jit
def _cell(i_r, i_z, i_n, h_r, h_z, q, h, ACCURATE: tl.constexpr):
    r = tl.sigmoid(i_r + h_r)
    z = tl.sigmoid(i_z + h_z)
    n = _tanh(i_n + r * q, ACCURATE)
    return r, z, n, n + z * (h - n)


@triton.jit
def _cell_backward(dh, r, z, n, q, h_prev):
    da_n = dh * (1.0 - z) * (1.0 - n * n)
    da_z = dh * (h_prev - n) * z * (1.0 - z)
    da_r = da_n * q * r * (1.0 - r)
    return da_r, da_z, da_n, da_n * r


@triton.jit
def _peak(x, AXIS: tl.constexpr):
    # Never zero, so that a scale of 1024 / peak is finite.
    return tl.maximum(tl.max(tl.abs(x), axis=AXIS), 1e-30)


@triton.jit
def _parts(x, SPLIT: tl.constexpr):
    # fp32 as a sum of two fp16 numbers: 22 bits of mantissa while |x| lies within 2^-12 of 1024, and never an error
    # above 2^-25. Without SPLIT the second part is not used.
    if SPLIT:
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
    else:
        high = x
        low = x
    return high, low


@triton.jit
def _dot(w, x, acc, PRECISION: tl.constexpr):
    if WIDEN:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc, input_precision=PRECISION)


@triton.jit
def _product(w_high, w_low, x, acc, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    if SPLIT:
        # fp16x3: the product of the two low parts is below the rounding of the others.
        x_high, x_low = _parts(x, SPLIT)
        acc = _dot(w_low, x_high, acc, PRECISION)
        acc = _dot(w_high, x_low, acc, PRECISION)
        acc = _dot(w_high, x_high, acc, PRECISION)
    else:
        acc = _dot(w_high, x.to(w_high.dtype), acc, PRECISION)
    return acc


@triton.jit
def _load_weights(w, mask, SPLIT: tl.constexpr):
    # One gate's recurrent weights in the form `_product` takes, and the largest of them if SPLIT. Gate by gate, since
    # all three in fp32 at once would fill the registers.
    x = tl.load(w, mask, 0.0)
    peak = 1.0
    if SPLIT:
        peak = _peak(x, None)
        x *= 1024.0 / peak
    high, low = _parts(x, SPLIT)
    return high, low, peak


@triton.jit
def _row(packing_ptr, t, b0, d, T, B):
    """Row of y, for direction d, where batch row b0 lies at step t; of no meaning outside of 0 <= t < T."""
    if packing_ptr is None:
        return (t.to(tl.int64) * B + b0) * 2 + d
    else:
        return (tl.load(packing_ptr + B + t, (t >= 0) & (t < T), 0) + b0) * 2 + d


@triton.jit
def _extent(packing_ptr, b0, b, T, B):
    """How far the block's rows go: their number or, packed, the length of each; and the steps that none of them has."""
    if packing_ptr is None:
        return B - b0, 0
    else:
        lengths = tl.load(packing_ptr + b0 + b, b0 + b < B, 0).to(tl.int32)
        return lengths, T - tl.load(packing_ptr + b0).to(tl.int32)


@triton.jit
def _present(packing_ptr, extent, t, b, inside):
    """Which of the block's rows are there at step t; none unless inside, i.e. unless there is such a step."""
    if packing_ptr is None:
        return b < tl.where(inside, extent, 0)
    else:
        return t < tl.where(inside, extent, -1)


@triton.jit
def _load_gates_in(gi_ptr, row, offs, mask, H: tl.constexpr):
    gi = gi_ptr + row * (3 * H) + offs
    i_r = tl.load(gi, mask, 0.0).to(tl.float32)
    i_z = tl.load(gi + H, mask, 0.0).to(tl.float32)
    i_n = tl.load(gi + 2 * H, mask, 0.0).to(tl.float32)
    return i_r, i_z, i_n


@triton.jit
def _store_gates(gates_ptr, row, offs, mask, r, z, n, q, H: tl.constexpr):
    gates = gates_ptr + row * (4 * H) + offs
    tl.store(gates, r, mask)
    tl.store(gates + H, z, mask)
    tl.store(gates + 2 * H, n, mask)
    tl.store(gates + 3 * H, q, mask)


@triton.jit(do_not_specialize=SIZES)
def gru_forward_kernel(
    gi_ptr,  # (T, B, D, 3H)
    w_hh_ptr,  # (D, 3H, H)
    b_hn_ptr,  # (D, H); not touched unless HAS_BIAS
    h0_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    h_n_ptr,  # (D, B, H)
    gates_ptr,  # (T, B, D, 4, H), r, z, n, q; not touched unless SAVE
    packing_ptr,  # (B + T) int64, or None
    T,
    B,
    H: tl.constexpr,
    HP: tl.constexpr,  # H padded to a power of two
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    j = tl.arange(0, HP)
    k = tl.arange(0, HP)
    b = tl.arange(0, N)
    mask_j = j < H
    mask = mask_j[:, None] & (b0 + b < B)[None, :]
    w = w_hh_ptr + d * (3 * H * H) + j[:, None] * H + k[None, :]
    mask_w = mask_j[:, None] & (k < H)[None, :]
    wr_high, wr_low, wr_peak = _load_weights(w, mask_w, SPLIT)
    wz_high, wz_low, wz_peak = _load_weights(w + H * H, mask_w, SPLIT)
    wn_high, wn_low, wn_peak = _load_weights(w + 2 * H * H, mask_w, SPLIT)
    b_hn = tl.zeros([HP], tl.float32)
    if HAS_BIAS:
        b_hn = tl.load(b_hn_ptr + d * H + j, mask_j, 0.0).to(tl.float32)

    offs_gi = b[None, :] * (2 * 3 * H) + j[:, None]
    offs_y = b[None, :] * (2 * H) + j[:, None]
    offs_gates = b[None, :] * (2 * 4 * H) + j[:, None]
    offs_h = (d.to(tl.int64) * B + b0) * H + b[None, :] * H + j[:, None]
    h = tl.load(h0_ptr + offs_h, mask, 0.0).to(tl.float32)
    if SPLIT:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        h_peak = tl.maximum(_peak(h, 0), 1.0)[None, :]
        h_scale = 1024.0 / h_peak
        unscale = h_peak * (1.0 / (1024.0 * 1024.0))

    extent, start = _extent(packing_ptr, b0, b, T, B)
    t = d * (T - 1 - start)
    step = 1 - 2 * d
    row = _row(packing_ptr, t, b0, d, T, B)
    present = mask
    if packing_ptr is not None:
        row_next = _row(packing_ptr, t + step, b0, d, T, B)
        present = mask_j[:, None] & (t < extent)[None, :]
    i_r, i_z, i_n = _load_gates_in(gi_ptr, row, offs_gi, present, H)
    for s in range(start, T):
        # The next step's input gates are asked for before this step's products, which hide their latency. Where they
        # lie was asked for a step earlier still.
        mask_next = mask_j[:, None] & _present(packing_ptr, extent, t + step, b, s + 1 < T)[None, :]
        if packing_ptr is None:
            row_next = _row(packing_ptr, t + step, b0, d, T, B)
        else:
            row_after = _row(packing_ptr, t + 2 * step, b0, d, T, B)
        next_r, next_z, next_n = _load_gates_in(gi_ptr, row_next, offs_gi, mask_next, H)
        zero = tl.zeros([HP, N], tl.float32)
        x = h
        if SPLIT:
            x = h * h_scale
        h_r = _product(wr_high, wr_low, x, zero, SPLIT, PRECISION)
        h_z = _product(wz_high, wz_low, x, zero, SPLIT, PRECISION)
        q = _product(wn_high, wn_low, x, zero, SPLIT, PRECISION)
        if SPLIT:
            h_r *= unscale * wr_peak
            h_z *= unscale * wz_peak
            q *= unscale * wn_peak
        q += b_hn[:, None]
        r, z, n, h_new = _cell(i_r, i_z, i_n, h_r, h_z, q, h, ACCURATE)
        if packing_ptr is None:
            h = h_new
            row = _row(packing_ptr, t, b0, d, T, B)
        else:
            present = mask_j[:, None] & (t < extent)[None, :]
            h = tl.where((t < extent)[None, :], h_new, h)
        tl.store(y_ptr + row * H + offs_y, h, present)
        if SAVE:
            _store_gates(gates_ptr, row, offs_gates, present, r, z, n, q, H)
        i_r, i_z, i_n = next_r, next_z, next_n
        if packing_ptr is not None:
            row, row_next = row_next, row_after
        t += step
    tl.store(h_n_ptr + offs_h, h, mask)


@triton.jit
def _load_saved(
    dy_ptr, y_ptr, h0_ptr, gates_ptr, packing_ptr, row, row_before, t, s, b0, d, i, b, extent, T, B, H: tl.constexpr
):  # fmt: skip
    # s counts backward steps; at T there is nothing to load. The state before a row's first step is h0: at s = T - 1
    # or, packed, at t = 0 in direction 0 and at the sequence's own end in direction 1. Rows are given where packed.
    mask_i = (i < H)[:, None]
    present = _present(packing_ptr, extent, t, b, s < T)
    mask = mask_i & present[None, :]
    if packing_ptr is None:
        row = _row(packing_ptr, t, b0, d, T, B)
    offs_y = b[None, :] * (2 * H) + i[:, None]
    dy = tl.load(dy_ptr + row * H + offs_y, mask, 0.0).to(tl.float32)
    gates = gates_ptr + row * (4 * H) + b[None, :] * (2 * 4 * H) + i[:, None]
    r = tl.load(gates, mask, 0.0).to(tl.float32)
    # z = 1 where there is no row: its gradient passes unchanged.
    z = tl.load(gates + H, mask, 0.0 if packing_ptr is None else 1.0).to(tl.float32)
    n = tl.load(gates + 2 * H, mask, 0.0).to(tl.float32)
    q = tl.load(gates + 3 * H, mask, 0.0).to(tl.float32)
    if packing_ptr is None:
        row_before = _row(packing_ptr, t + 2 * d - 1, b0, d, T, B)
    previous = y_ptr + row_before * H + offs_y
    first = h0_ptr + (d.to(tl.int64) * B + b0) * H + b[None, :] * H + i[:, None]
    if packing_ptr is None:
        has_previous = _present(packing_ptr, extent, t, b, s < T - 1)
    else:
        has_previous = present & (t != d * (extent - 1))
    h_prev = tl.load(previous, mask_i & has_previous[None, :], 0.0).to(tl.float32)
    if packing_ptr is None:
        is_first = _present(packing_ptr, extent, t, b, s == T - 1)
    else:
        is_first = present & (t == d * (extent - 1))
    h_prev += tl.load(first, mask_i & is_first[None, :], 0.0).to(tl.float32)
    return dy, r, z, n, q, h_prev


@triton.jit
def _store_gate_gradients(dgi_ptr, dq_ptr, row, offs_gi, offs_y, mask, da_r, da_z, da_n, dq, H: tl.constexpr):
    dgi = dgi_ptr + row * (3 * H) + offs_gi
    tl.store(dgi, da_r, mask)
    tl.store(dgi + H, da_z, mask)
    tl.store(dgi + 2 * H, da_n, mask)
    tl.store(dq_ptr + row * H + offs_y, dq, mask)


@triton.jit(do_not_specialize=SIZES)
def gru_backward_kernel(
    dy_ptr,  # (T, B, D, H)
    dh_n_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    gates_ptr,  # (T, B, D, 4, H), r, z, n, q
    h0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 3H, H)
    dgi_ptr,  # (T, B, D, 3H)
    dq_ptr,  # (T, B, D, H)
    dh0_ptr,  # (D, B, H)
    packing_ptr,  # (B + T) int64, or None
    before_ptr,  # (P, D, H), the state before each step; None unless packed
    T,
    B,
    H: tl.constexpr,
    HP: tl.constexpr,  # H padded to a power of two
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b0 = tl.program_id(0) * N
    d = tl.program_id(1)
    i = tl.arange(0, HP)
    k = tl.arange(0, HP)
    b = tl.arange(0, N)
    mask = (i < H)[:, None] & (b0 + b < B)[None, :]
    # Transposed: element (i, k) of the operand is w_hh[gate, k, i].
    w = w_hh_ptr + d * (3 * H * H) + k[None, :] * H + i[:, None]
    mask_w = (i < H)[:, None] & (k < H)[None, :]
    wr_high, wr_low, wr_peak = _load_weights(w, mask_w, SPLIT)
    wz_high, wz_low, wz_peak = _load_weights(w + H * H, mask_w, SPLIT)
    wn_high, wn_low, wn_peak = _load_weights(w + 2 * H * H, mask_w, SPLIT)

    offs_gi = b[None, :] * (2 * 3 * H) + i[:, None]
    offs_y = b[None, :] * (2 * H) + i[:, None]
    offs_h = (d.to(tl.int64) * B + b0) * H + b[None, :] * H + i[:, None]
    dh = tl.load(dh_n_ptr + offs_h, mask, 0.0).to(tl.float32)
    w_peak = 1.0
    if SPLIT:
        w_peak = tl.maximum(tl.maximum(wr_peak, wz_peak), wn_peak)

    extent, start = _extent(packing_ptr, b0, b, T, B)
    t = (1 - d) * (T - 1 - start)
    step = 2 * d - 1
    present = mask
    row, row_next, row_after = None, None, None
    if packing_ptr is not None:
        row = _row(packing_ptr, t, b0, d, T, B)
        row_next = _row(packing_ptr, t + step, b0, d, T, B)
        row_after = row_next
    dy, r, z, n, q, h_prev = _load_saved(
        dy_ptr, y_ptr, h0_ptr, gates_ptr, packing_ptr, row, row_next, t, start, b0, d, i, b, extent, T, B, H
    )  # fmt: skip
    for s in range(start, T):
        da_r, da_z, da_n, dq = _cell_backward(dh + dy, r, z, n, q, h_prev)
        dh = (dh + dy) * z
        if packing_ptr is not None:
            row_after = _row(packing_ptr, t + 2 * step, b0, d, T, B)
            present = (i < H)[:, None] & (t < extent)[None, :]
            tl.store(before_ptr + row * H + offs_y, h_prev, present)
        # The next step's operands are asked for before this step's products, which hide their latency.
        dy, r, z, n, q, h_prev = _load_saved(
            dy_ptr, y_ptr, h0_ptr, gates_ptr, packing_ptr, row_next, row_after, t + step, s + 1, b0, d, i, b, extent,
            T, B, H,
        )  # fmt: skip
        if SPLIT:
            # Gradients have no bound, so each batch row is scaled by its own largest one.
            a_peak = _peak(tl.maximum(tl.maximum(tl.abs(da_r), tl.abs(da_z)), tl.abs(dq)), 0)[None, :]
            # The three products add up in one accumulator, so all carry the scale 1024 / w_peak * 1024 / a_peak.
            scale = 1024.0 / a_peak
            acc = tl.zeros([HP, N], tl.float32)
            acc = _product(wr_high, wr_low, da_r * (scale * (wr_peak / w_peak)), acc, SPLIT, PRECISION)
            acc = _product(wz_high, wz_low, da_z * (scale * (wz_peak / w_peak)), acc, SPLIT, PRECISION)
            acc = _product(wn_high, wn_low, dq * (scale * (wn_peak / w_peak)), acc, SPLIT, PRECISION)
            dh += acc * (a_peak * (w_peak * (1.0 / (1024.0 * 1024.0))))
        else:
            dh = _product(wr_high, wr_low, da_r, dh, SPLIT, PRECISION)
            dh = _product(wz_high, wz_low, da_z, dh, SPLIT, PRECISION)
            dh = _product(wn_high, wn_low, dq, dh, SPLIT, PRECISION)
        stored = _row(packing_ptr, t, b0, d, T, B) if packing_ptr is None else row
        _store_gate_gradients(dgi_ptr, dq_ptr, stored, offs_gi, offs_y, present, da_r, da_z, da_n, dq, H)
        if packing_ptr is not None:
            row, row_next = row_next, row_after
        t += step
    tl.store(dh0_ptr + offs_h, dh, mask)
