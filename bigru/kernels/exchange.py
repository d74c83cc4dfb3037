"""The jit functions by which the programs of a cooperative launch wait for one another and exchange their results.

`bigru.kernels.cooperative` says what they exchange, and why every wait ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bigru.kernels.cell import _dot, _finite, _parts, _peak

ABANDONED = tl.constexpr(1 << 48)
"""Added to a group's count of arrivals by a program that gives up; more than all arrivals."""


@triton.jit
def _arrive(arrivals_ptr):
    # The barrier puts every thread's stores (and loads, of what will be overwritten next) before the addition, which
    # one thread makes; its release puts them all before whatever follows an acquire that sees the addition.
    tl.debug_barrier()
    tl.atomic_add(arrivals_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(arrivals_ptr, arrivals, MAX_POLLS: tl.constexpr):
    """Waits for so many arrivals; true if the wait was given up, here or in any other program of the group.

    A program that gives up adds ABANDONED to the count, which ends all waits of the group, now and later.
    The caller makes its state NaN and carries on: it never leaves the time loop early and never waits for long again.
    """
    # Additions of zero, which the compiler makes acquiring loads, and not tl.load: one thread asks and all get its
    # answer, so that all take the same branch.
    count = tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu")
    polls = 1
    while (count < arrivals) & (polls < MAX_POLLS):
        count = tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    if count < arrivals:
        tl.atomic_add(arrivals_ptr, ABANDONED, sem="relaxed", scope="gpu")
    # The acquire was one thread's; the barrier puts it before every thread's loads.
    tl.debug_barrier()
    return (count < arrivals) | (count >= ABANDONED)


@triton.jit
def _load_exchanged(x):
    # From the L2 cache: a line of the L1 cache may be two steps old. (The acquire alone would do.)
    return tl.load(x, cache_modifier=".cg")


@triton.jit
def _operand(x, scale, OPERAND: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr):
    # A factor of a product, as high and low part; without SPLIT both are the same.
    if SCALED:
        x *= scale
    if SPLIT:
        high, low = _parts(x, SPLIT)
    else:
        high = x.to(OPERAND)
        low = high
    return high, low


@triton.jit
def _multiply(x_high, x_low, w_high, w_low, acc, SPLIT: tl.constexpr):
    if SPLIT:
        # fp16x3: the product of the two low parts is below the rounding of the others.
        acc = _dot(x_low, w_high, acc, "tf32")
        acc = _dot(x_high, w_low, acc, "tf32")
    return _dot(x_high, w_high, acc, "tf32")


@triton.jit
def _load_rows(w, unit, k, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr):
    """Rows `unit` of one gate's W_hh: high and low parts, both in chunks of the columns `k`, and the largest number."""
    SCALED: tl.constexpr = w.dtype.element_ty == tl.float32
    OPERAND: tl.constexpr = tl.float16 if SCALED else w.dtype.element_ty
    peak = 1.0
    scale = 1.0
    if SCALED:
        peak = 1e-30
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + k
            x = tl.load(w + unit * H + column, (unit < H) & (column < H), 0.0)
            peak = tl.maximum(peak, _peak(_finite(x), None))
        scale = 1024.0 / peak
    highs: tl.tuple = ()
    lows: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + k
        x = tl.load(w + unit * H + column, (unit < H) & (column < H), 0.0)
        high, low = _operand(x, scale, OPERAND, SCALED, SPLIT)
        highs += (high,)
        lows += (low,)
    return highs, lows, peak


@triton.jit
def _publish_state(state, h, scale, PART: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr):
    high, low = _operand(h, scale, state.dtype.element_ty, SCALED, SPLIT)
    tl.store(state, high)
    if SPLIT:
        tl.store(state + PART, low)


@triton.jit
def _load_state(state, PART: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr):
    highs: tl.tuple = ()
    lows: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        x = _load_exchanged(state + c * CHUNK)
        highs += (x,)
        if SPLIT:
            x = _load_exchanged(state + PART + c * CHUNK)
        lows += (x,)
    return highs, lows


@triton.jit
def _state_product(
    x, w, WARPS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr
):
    acc = tl.zeros([WARPS, N, S], tl.float32)
    for c in tl.static_range(CHUNKS):
        acc = _multiply(x[0][c], x[1][c], w[0][c], w[1][c], acc, SPLIT)
    return _sum_over_warps(acc, WARPS, N, S)


@triton.jit
def _sum_over_warps(x, WARPS: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """Sum of (WARPS, N, S) over its first axis, along which each warp holds its own share.

    tl.sum would fold the shares with shuffles, over many trips through shared memory. tl.split wants what it splits in
    one thread, so that the first one moves all shares of a number to one thread, in one trip, and the others nothing.
    """
    x = tl.permute(x, (1, 2, 0))
    for i in tl.static_range(5):
        if WARPS >> i > 1:
            a, b = tl.split(tl.reshape(x, [N, S, WARPS >> (i + 1), 2]))
            x = a + b
    return tl.reshape(x, [N, S])
