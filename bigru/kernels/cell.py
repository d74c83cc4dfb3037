"""The jit functions that the Triton kernels share: one time step of the recurrence, its products and its addresses.

State, accumulation and all element-wise arithmetic are fp32 whatever the storage. Offsets inside one time step are
32-bit, the step's own offset is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bf16 as if it were integers (triton 3.6 to 3.9); there, operands are widened first, which
# changes nothing: products of two bf16 or fp16 numbers are exact in fp32.
INTERPRETED = triton.knobs.runtime.interpret
"""True if the kernels run in Triton's interpreter: TRITON_INTERPRET as it was when this module was imported."""
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
WIDEN = tl.constexpr(INTERPRETED)

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
def _finite(x):
    # For the scale of weights: an infinite one spoils its own unit, not all of them.
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


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
def _weighted(w, x, acc, PRECISION: tl.constexpr):
    # w is (H, H), or (groups, rows of a group, H): then the product (H, N) is a batch of them, each with all of x.
    if len(w.shape) == 2:
        return _dot(w, x, acc, PRECISION)
    else:
        # Not by a reshape: above that, triton 3.9 moves no change of layout, and each group would get an x of its own.
        x = x[None, :, :].broadcast_to([w.shape[0], x.shape[0], x.shape[1]])
        acc = acc.reshape([w.shape[0], w.shape[1], x.shape[2]])
        return _dot(w, x, acc, PRECISION).reshape([w.shape[0] * w.shape[1], x.shape[2]])


@triton.jit
def _product(w, x, unscale, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    # w as `_load_weights` returns it; its parts in groups of rows, or not.
    x_high, x_low = _parts(x, SPLIT)
    zero = tl.zeros([w[0].shape[-1], x.shape[1]], tl.float32)
    acc = _weighted(w[0], x_high.to(w[0].dtype), zero, PRECISION)
    if SPLIT:
        # fp16x3: the product of the two low parts is below the rounding of the others. Small terms have an accumulator
        # of their own, so that MMAs need not wait for one another.
        unscale *= w[2] * (1.0 / 1024.0)
        small = _weighted(w[0], x_low, _weighted(w[1], x_high, zero, PRECISION), PRECISION)
        acc = acc * unscale + small * unscale
    return acc


@triton.jit
def _load_weights(w, mask, SPLIT: tl.constexpr):
    # One gate's recurrent weights: high and low parts, and the largest of them if SPLIT. Gate by gate, since all three
    # in fp32 at once would fill the registers.
    x = tl.load(w, mask, 0.0)
    peak = 1.0
    if SPLIT:
        peak = _peak(_finite(x), None)
        x *= 1024.0 / peak
    high, low = _parts(x, SPLIT)
    return high, low, peak


@triton.jit
def _row(varlen_ptr, t, b0, d, T, B):
    """Returns the row of y, for direction d, where batch row b0 lies at step t; of no meaning outside of 0 <= t < T."""
    if varlen_ptr is None:
        return (t.to(tl.int64) * B + b0) * 2 + d
    else:
        return (tl.load(varlen_ptr + B + t, (t >= 0) & (t < T), 0) + b0) * 2 + d


@triton.jit
def _extent(varlen_ptr, b0, b, T, B):
    """Returns the number of the block's rows or, with varlen, each one's length; and the steps without any."""
    if varlen_ptr is None:
        return B - b0, 0
    else:
        lengths = tl.load(varlen_ptr + b0 + b, b0 + b < B, 0).to(tl.int32)  # of b's shape
        return lengths, T - tl.load(varlen_ptr + b0).to(tl.int32)


@triton.jit
def _present(varlen_ptr, extent, t, b, inside):
    """Returns which of the block's rows exist at step t: none unless inside, i.e. unless there is such a step."""
    if varlen_ptr is None:
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


@triton.jit
def _load_saved(
    dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row, row_prev, t, s, T, b0, d, i, b, extent, B, H: tl.constexpr
):  # fmt: skip
    # i and b, units and rows, are broadcast against each other. s counts backward steps; at T there is nothing to load.
    # The state before a row's first step is h0: at s = T - 1 or, with varlen, at t = 0 in direction 0 and at the
    # sequence's own end in direction 1. Rows are given with varlen.
    present = _present(varlen_ptr, extent, t, b, s < T)
    if varlen_ptr is None:
        row = _row(varlen_ptr, t, b0, d, T, B)
        row_prev = _row(varlen_ptr, t + 2 * d - 1, b0, d, T, B)
        has_prev = _present(varlen_ptr, extent, t, b, s < T - 1)
        is_first = _present(varlen_ptr, extent, t, b, s == T - 1)
    else:
        has_prev = present & (t != d * (extent - 1))
        is_first = present & (t == d * (extent - 1))
    mask = (i < H) & present
    offs_y = b * (2 * H) + i
    dy = tl.load(dy_ptr + row * H + offs_y, mask, 0.0).to(tl.float32)
    gates = gates_ptr + row * (4 * H) + b * (2 * 4 * H) + i
    r = tl.load(gates, mask, 0.0).to(tl.float32)
    # z = 1 where there is no row: its gradient passes unchanged.
    z = tl.load(gates + H, mask, 0.0 if varlen_ptr is None else 1.0).to(tl.float32)
    n = tl.load(gates + 2 * H, mask, 0.0).to(tl.float32)
    q = tl.load(gates + 3 * H, mask, 0.0).to(tl.float32)
    h_prev = tl.load(y_ptr + row_prev * H + offs_y, (i < H) & has_prev, 0.0).to(tl.float32)
    h0 = h0_ptr + (d.to(tl.int64) * B + b0) * H + b * H + i
    h_prev += tl.load(h0, (i < H) & is_first, 0.0).to(tl.float32)
    return dy, r, z, n, q, h_prev


@triton.jit
def _store_gate_gradients(dgi_ptr, dq_ptr, row, offs_gi, offs_y, mask, da_r, da_z, da_n, dq, H: tl.constexpr):
    dgi = dgi_ptr + row * (3 * H) + offs_gi
    tl.store(dgi, da_r, mask)
    tl.store(dgi + H, da_z, mask)
    tl.store(dgi + 2 * H, da_n, mask)
    tl.store(dq_ptr + row * H + offs_y, dq, mask)
