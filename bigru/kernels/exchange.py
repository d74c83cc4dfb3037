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
def _row_peak(w, unit, k, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The largest finite number in rows `unit` of one gate's fp32 W_hh, and 1 for other dtypes."""
    if w.dtype.element_ty == tl.float32:
        # Triton makes one of two loads alike, and would keep all chunks in registers; this one names the default.
        peaks = tl.abs(_finite(tl.load(w + (unit * H + k), (unit < H) & (k < H), 0.0, cache_modifier=".ca")))
        for c in tl.static_range(1, CHUNKS):
            column = c * CHUNK + k
            x = tl.load(w + (unit * H + column), (unit < H) & (column < H), 0.0, cache_modifier=".ca")
            peaks = tl.maximum(peaks, tl.abs(_finite(x)))
        return _peak(peaks, None)
    else:
        return 1.0


@triton.jit
def _peaks(w, unit, k, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """`_row_peak` of the three gates."""
    return (
        _row_peak(w, unit, k, H, CHUNK, CHUNKS),
        _row_peak(w + H * H, unit, k, H, CHUNK, CHUNKS),
        _row_peak(w + 2 * H * H, unit, k, H, CHUNK, CHUNKS),
    )


@triton.jit
def _load_rows(
    w, unit, k, peak, GATE: tl.constexpr, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows `unit` of one gate's W_hh, scaled by 1024 / peak: high and low parts, both in chunks of the columns `k`."""
    SCALED: tl.constexpr = w.dtype.element_ty == tl.float32
    OPERAND: tl.constexpr = tl.float16 if SCALED else w.dtype.element_ty
    highs: tl.tuple = ()
    lows: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        column = c * CHUNK + k
        # One pointer for all gates: with three, triton 3.9 spills one of them on sm_100 at H=1024.
        x = tl.load(w + (GATE * H * H + unit * H + column), (unit < H) & (column < H), 0.0)
        high, low = _operand(x, 1024.0 / peak, OPERAND, SCALED, SPLIT)
        highs += (high,)
        lows += (low,)
    return highs, lows


@triton.jit
def _load_gates_rows(
    w, unit, k, peaks, H: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr
):
    """`_load_rows` of the three gates."""
    w_r = _load_rows(w, unit, k, peaks[0], 0, H, CHUNK, CHUNKS, SPLIT)
    w_z = _load_rows(w, unit, k, peaks[1], 1, H, CHUNK, CHUNKS, SPLIT)
    return w_r, w_z, _load_rows(w, unit, k, peaks[2], 2, H, CHUNK, CHUNKS, SPLIT)


@triton.jit
def _publish_state(state, h, scale, PART: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr):
    high, low = _operand(h, scale, state.dtype.element_ty, SCALED, SPLIT)
    tl.store(state, high)
    if SPLIT:
        tl.store(state + PART, low)


@triton.jit
def _places(b, j, N: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr):
    """Where unit j of row b of the state lies in the exchange.

    The threads of an NVIDIA GPU multiply what they hold, so it lies as they hold it in a product of 16 rows and 16 of a
    warp's units: thread 4g + c has rows g and g + 8 and units 2c, 2c + 1, 2c + 8 and 2c + 9, 16 bytes. What is loaded
    from there needs no way through shared memory. From the slowest to the fastest, the axes are the chunks, a warp's
    sixteens of units, sixteens of rows, warps, g, c, the eights of units, the eights of rows and the two units.
    """
    SLICE: tl.constexpr = CHUNK // WARPS
    place = (j // CHUNK * (SLICE // 16) + j % SLICE // 16) * (N // 16) + b // 16
    place = (place * WARPS + j % CHUNK // SLICE) * 32 + b % 8 * 4 + j % 8 // 2
    # Triton does not see that the two stay together; not knowing, 3.6 would store column by column.
    place = place * 8 + j % 16 // 8 * 4 + b % 16 // 8 * 2 + j % 2
    return tl.max_contiguous(tl.multiple_of(place, [1, 2]), [1, 2])


@triton.jit
def _load_tile(state, N: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr):
    """One chunk of the state, (WARPS, N, CHUNK / WARPS)."""
    place = tl.arange(0, N * CHUNK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = _load_exchanged(state + place).reshape([CHUNK // WARPS // 16, N // 16, WARPS, 8, 4, 2, 2, 2])
    return x.permute([2, 1, 6, 3, 0, 5, 4, 7]).reshape([WARPS, N, CHUNK // WARPS])


@triton.jit
def _load_state(
    state, PART: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    highs: tl.tuple = ()
    lows: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        x = _load_tile(state + c * (N * CHUNK), N, CHUNK, WARPS)
        highs += (x,)
        if SPLIT:
            x = _load_tile(state + PART + c * (N * CHUNK), N, CHUNK, WARPS)
        lows += (x,)
    return highs, lows


@triton.jit
def _state_product(
    x, w, WARPS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr,
    JOINED: tl.constexpr,
):  # fmt: skip
    """One gate's product, (N, S), or if JOINED what `_sum_gates` takes: each warp's share of it, (WARPS, N, S)."""
    acc = tl.zeros([WARPS, N, S], tl.float32)
    for c in tl.static_range(CHUNKS):
        acc = _multiply(x[0][c], x[1][c], w[0][c], w[1][c], acc, SPLIT)
    if JOINED:
        return acc
    else:
        return _sum_over_warps(acc, WARPS, N, S)


@triton.jit
def _sum_gates(r, z, n, WARPS: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    # One trip through shared memory for all of them, as four: there is no tensor of three.
    x = tl.reshape(tl.join(tl.join(r, z), tl.join(n, n)), [WARPS, N, S * 4])
    r_z, n_n = tl.split(tl.reshape(_sum_over_warps(x, WARPS, N, S * 4), [N, S, 2, 2]))
    r, z = tl.split(r_z)
    n, _ = tl.split(n_n)
    return r, z, n


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
