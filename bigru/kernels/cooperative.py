"""The recurrence for hidden sizes above 128, split over the programs of one cooperative launch.

W_hh no longer fits one multiprocessor, so a *group* of programs shares the work of one direction and one block of batch
rows. Each program owns S hidden units and keeps their rows of W_hh, all three gates, on chip for the whole sequence.
Once a step the programs of a group exchange what the others need, through buffers in global memory that are small
enough to stay in the L2 cache:

- forward: each program publishes the new state of its units and reads the state of all units;
- backward: each program multiplies the gate gradients of its units by the same rows of W_hh, which gives its share of
  the gradient of every unit's state; it publishes that, and adds up the shares of its own units, always in one order.

To publish is to store, a barrier, and one atomic addition with release semantics to the group's count of arrivals; to
wait is to poll that count with acquire semantics. A cooperative launch runs all of its programs at once or fails as a
whole, so every wait ends. Should that ever not hold, a wait is given up after MAX_POLLS polls, and whatever was not
finished becomes NaN: y from that step on and h_n, or dgi and dq from that step on and dh0 (`_wait`). Nothing hangs and
nothing has to ask the GPU whether all went well.

Products have batch rows as their short side: h[N, H] @ W_hh^T[H, S] and da[N, S] @ W_hh[S, H]. For fp32 storage their
factors are scaled fp16, two parts of each for precision "fp32" (as in `bigru.kernels.portable`) and one for "tf32",
which has TF32's ten bits of mantissa at half its bytes. State, accumulation and element-wise arithmetic are fp32.
Offsets inside one time step are 32-bit, the step's own offset is 64-bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigru.kernels.portable import (
    _cell,
    _cell_backward,
    _dot,
    _load_gates_in,
    _parts,
    _peak,
    _row,
    _store_gate_gradients,
    _store_gates,
)

if TYPE_CHECKING:
    from bigru.kernels.launch import Device, Precision

SMALLEST = 129
"""First hidden size served: up to 128, W_hh fits one multiprocessor."""
ABANDONED = tl.constexpr(1 << 48)
"""Added to a group's count of arrivals by a program that gives up; more than all arrivals."""
NEWER_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)
"""Whether triton is newer than 3.6, under which every size compiles without a spill."""
MOST_WIDE = 640 * 16
"""Most weights of one gate in a program for fp32 storage under a newer triton: with more, triton 3.9's code spills."""
SIZES = ("T", "B", "first_b", "first_d")
"""Arguments that a kernel is not compiled anew for, as in `portable`."""
COUNTER = tl.constexpr(16)
"""64-bit integers from one group's count to the next: each in a cache line of its own."""


@triton.jit
def _arrive(arrivals_ptr):
    # The barrier puts every thread's stores (and loads, of what will be overwritten next) before the addition, which
    # one thread makes; its release puts them all before whatever follows an acquire that sees the addition.
    tl.debug_barrier()
    tl.atomic_add(arrivals_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _wait(arrivals_ptr, arrivals, MAX_POLLS: tl.constexpr):
    """Waits for so many arrivals; true if the wait was given up, here or in any other program of the group.

    Who gives up adds ABANDONED to the count: that ends all waits of the group, now and later.
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
            peak = tl.maximum(peak, _peak(tl.load(w + unit * H + column, (unit < H) & (column < H), 0.0), None))
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
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=SIZES)
def gru_forward_cooperative_kernel(
    gi_ptr,  # (T, B, D, 3H)
    w_hh_ptr,  # (D, 3H, H)
    b_hn_ptr,  # (D, H); not touched unless HAS_BIAS
    h0_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    h_n_ptr,  # (D, B, H)
    gates_ptr,  # (T, B, D, 4, H), r, z, n, q; not touched unless SAVE
    state_ptr,  # (groups, 2, 2 if SPLIT else 1, N, CHUNKS * CHUNK) of the products' dtype, zero on entry
    arrivals_ptr,  # (groups, COUNTER) int64, zero on entry
    T,
    B,
    first_b,  # first batch row of this launch
    first_d,  # first direction of this launch
    H: tl.constexpr,
    S: tl.constexpr,  # hidden units of one program
    N: tl.constexpr,  # batch rows of one group
    CHUNK: tl.constexpr,  # columns of W_hh in one product
    WARPS: tl.constexpr,  # each multiplies its own part of a chunk
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_POLLS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    HP: tl.constexpr = CHUNKS * CHUNK
    SCALED: tl.constexpr = w_hh_ptr.dtype.element_ty == tl.float32
    PROGRAMS: tl.constexpr = (H + S - 1) // S
    HALF: tl.constexpr = (2 if SPLIT else 1) * N * HP
    b0 = first_b + tl.program_id(1) * N
    d = first_d + tl.program_id(2)
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    j = tl.program_id(0) * S + tl.arange(0, S)
    b = tl.arange(0, N)
    mask_j = (j < H)[None, :]
    mask = mask_j & (b0 + b < B)[:, None]

    # Columns by warp: (WARPS, CHUNK / WARPS).
    k = tl.arange(0, WARPS)[:, None] * (CHUNK // WARPS) + tl.arange(0, CHUNK // WARPS)[None, :]
    w = w_hh_ptr + d * (3 * H * H)
    w_r = _load_rows(w, j[None, None, :], k[:, :, None], H, CHUNK, CHUNKS, SPLIT)
    w_z = _load_rows(w + H * H, j[None, None, :], k[:, :, None], H, CHUNK, CHUNKS, SPLIT)
    w_n = _load_rows(w + 2 * H * H, j[None, None, :], k[:, :, None], H, CHUNK, CHUNKS, SPLIT)
    b_hn = tl.zeros([S], tl.float32)
    if HAS_BIAS:
        b_hn = tl.load(b_hn_ptr + d * H + j, j < H, 0.0).to(tl.float32)

    offs_gi = b[:, None] * (2 * 3 * H) + j[None, :]
    offs_y = b[:, None] * (2 * H) + j[None, :]
    offs_gates = b[:, None] * (2 * 4 * H) + j[None, :]
    offs_h = (d.to(tl.int64) * B + b0) * H + b[:, None] * H
    h = tl.load(h0_ptr + offs_h + j[None, :], mask, 0.0).to(tl.float32)
    scale = 1.0
    unscale = 1.0
    if SCALED:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        h_peak = tl.full([N], 1.0, tl.float32)
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)[None, :]
            h0 = tl.load(h0_ptr + offs_h + column, (b0 + b < B)[:, None] & (column < H), 0.0)
            h_peak = tl.maximum(h_peak, _peak(h0, 1))
        scale = (1024.0 / h_peak)[:, None]
        unscale = (h_peak * (1.0 / (1024.0 * 1024.0)))[:, None]

    # Two buffers take turns. Who writes one at step s + 1 has waited for all arrivals of step s, each of which came
    # after that program's loads of step s - 1 from the same buffer.
    arrivals_ptr += group * COUNTER
    state_ptr += group * (2 * HALF)
    mine = state_ptr + b[:, None] * HP + j[None, :]
    everyones = state_ptr + b[None, :, None] * HP + k[:, None, :]
    _publish_state(mine, h, scale, N * HP, SCALED, SPLIT)
    _arrive(arrivals_ptr)
    t = d * (T - 1)
    i_r, i_z, i_n = _load_gates_in(gi_ptr, _row(None, t, b0, d, T, B), offs_gi, mask, H)
    for s in range(T):
        failed = _wait(arrivals_ptr, tl.full([], PROGRAMS, tl.int64) * (s + 1), MAX_POLLS)
        x = _load_state(everyones + (s % 2) * HALF, N * HP, CHUNK, CHUNKS, SPLIT)
        h_r = _state_product(x, w_r, WARPS, N, S, CHUNKS, SPLIT)
        h_z = _state_product(x, w_z, WARPS, N, S, CHUNKS, SPLIT)
        q = _state_product(x, w_n, WARPS, N, S, CHUNKS, SPLIT)
        if SCALED:
            h_r *= unscale * w_r[2]
            h_z *= unscale * w_z[2]
            q *= unscale * w_n[2]
        q += b_hn[None, :]
        h = tl.where(failed, float("nan"), h)
        r, z, n, h = _cell(i_r, i_z, i_n, h_r, h_z, q, h, SPLIT)
        _publish_state(mine + ((s + 1) % 2) * HALF, h, scale, N * HP, SCALED, SPLIT)
        _arrive(arrivals_ptr)
        # What no other program waits for comes after the arrival, and hides the exchange's latency.
        row = (t.to(tl.int64) * B + b0) * 2 + d
        tl.store(y_ptr + row * H + offs_y, h, mask)
        if SAVE:
            _store_gates(gates_ptr, row, offs_gates, mask, r, z, n, q, H)
        t += 1 - 2 * d
        mask_next = mask_j & (b < tl.where(s + 1 < T, B - b0, 0))[:, None]
        i_r, i_z, i_n = _load_gates_in(gi_ptr, _row(None, t, b0, d, T, B), offs_gi, mask_next, H)
    tl.store(h_n_ptr + offs_h + j[None, :], h, mask)


@triton.jit
def _load_saved(dy_ptr, y_ptr, h0_ptr, gates_ptr, t, s, b0, d, i, b, T, B, H: tl.constexpr):
    # As in `portable`, but rows by units. s counts backward steps: at the last one the state before it is h0; past it
    # there is nothing to load.
    rows = B - b0
    mask_i = (i < H)[None, :]
    mask = mask_i & (b < tl.where(s < T, rows, 0))[:, None]
    row = (t.to(tl.int64) * B + b0) * 2 + d
    offs_y = b[:, None] * (2 * H) + i[None, :]
    dy = tl.load(dy_ptr + row * H + offs_y, mask, 0.0).to(tl.float32)
    gates = gates_ptr + row * (4 * H) + b[:, None] * (2 * 4 * H) + i[None, :]
    r = tl.load(gates, mask, 0.0).to(tl.float32)
    z = tl.load(gates + H, mask, 0.0).to(tl.float32)
    n = tl.load(gates + 2 * H, mask, 0.0).to(tl.float32)
    q = tl.load(gates + 3 * H, mask, 0.0).to(tl.float32)
    previous = y_ptr + (((t + 2 * d - 1).to(tl.int64) * B + b0) * 2 + d) * H + offs_y
    first = h0_ptr + (d.to(tl.int64) * B + b0) * H + b[:, None] * H + i[None, :]
    h_prev = tl.load(previous, mask_i & (b < tl.where(s < T - 1, rows, 0))[:, None], 0.0).to(tl.float32)
    h_prev += tl.load(first, mask_i & (b < tl.where(s == T - 1, rows, 0))[:, None], 0.0).to(tl.float32)
    return dy, r, z, n, q, h_prev


@triton.jit(do_not_specialize=SIZES)
def gru_backward_cooperative_kernel(
    dy_ptr,  # (T, B, D, H)
    dh_n_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    gates_ptr,  # (T, B, D, 4, H), r, z, n, q
    h0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 3H, H)
    dgi_ptr,  # (T, B, D, 3H)
    dq_ptr,  # (T, B, D, H)
    dh0_ptr,  # (D, B, H)
    shares_ptr,  # (groups, 2, PROGRAMS, N, CHUNKS * CHUNK) fp32
    arrivals_ptr,  # (groups, COUNTER) int64, zero on entry
    T,
    B,
    first_b,  # first batch row of this launch
    first_d,  # first direction of this launch
    H: tl.constexpr,
    S: tl.constexpr,  # hidden units of one program
    N: tl.constexpr,  # batch rows of one group
    CHUNK: tl.constexpr,  # columns of W_hh in one product
    SPLIT: tl.constexpr,
    MAX_POLLS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    HP: tl.constexpr = CHUNKS * CHUNK
    PROGRAMS: tl.constexpr = (H + S - 1) // S
    SCALED: tl.constexpr = w_hh_ptr.dtype.element_ty == tl.float32
    OPERAND: tl.constexpr = tl.float16 if SCALED else w_hh_ptr.dtype.element_ty
    HALF: tl.constexpr = PROGRAMS * N * HP
    b0 = first_b + tl.program_id(1) * N
    d = first_d + tl.program_id(2)
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    i = tl.program_id(0) * S + tl.arange(0, S)
    k = tl.arange(0, CHUNK)
    b = tl.arange(0, N)
    mask = (i < H)[None, :] & (b0 + b < B)[:, None]
    w = w_hh_ptr + d * (3 * H * H)
    w_r = _load_rows(w, i[:, None], k[None, :], H, CHUNK, CHUNKS, SPLIT)
    w_z = _load_rows(w + H * H, i[:, None], k[None, :], H, CHUNK, CHUNKS, SPLIT)
    w_n = _load_rows(w + 2 * H * H, i[:, None], k[None, :], H, CHUNK, CHUNKS, SPLIT)
    w_peak = 1.0
    if SCALED:
        w_peak = tl.maximum(tl.maximum(w_r[2], w_z[2]), w_n[2])

    offs_gi = b[:, None] * (2 * 3 * H) + i[None, :]
    offs_y = b[:, None] * (2 * H) + i[None, :]
    offs_h = (d.to(tl.int64) * B + b0) * H + b[:, None] * H + i[None, :]
    dh = tl.load(dh_n_ptr + offs_h, mask, 0.0).to(tl.float32)
    arrivals_ptr += group * COUNTER
    shares_ptr += group * (2 * HALF)
    mine = shares_ptr + tl.program_id(0) * (N * HP) + b[:, None] * HP + k[None, :]
    of_mine = shares_ptr + b[:, None] * HP + i[None, :]
    t = (1 - d) * (T - 1)
    dy, r, z, n, q, h_prev = _load_saved(dy_ptr, y_ptr, h0_ptr, gates_ptr, t, 0, b0, d, i, b, T, B, H)
    for s in range(T):
        da_r, da_z, da_n, dq = _cell_backward(dh + dy, r, z, n, q, h_prev)
        dh = (dh + dy) * z
        scale_r = 1.0
        scale_z = 1.0
        scale_n = 1.0
        unscale = 1.0
        if SCALED:
            # Gradients have no bound, so each batch row is scaled by its own largest one (of this program's units).
            # The three products add up in one accumulator, so all carry the scale 1024 / w_peak * 1024 / a_peak.
            a_peak = _peak(tl.maximum(tl.maximum(tl.abs(da_r), tl.abs(da_z)), tl.abs(dq)), 1)[:, None]
            scale_r = (1024.0 / a_peak) * (w_r[2] / w_peak)
            scale_z = (1024.0 / a_peak) * (w_z[2] / w_peak)
            scale_n = (1024.0 / a_peak) * (w_n[2] / w_peak)
            unscale = a_peak * (w_peak * (1.0 / (1024.0 * 1024.0)))
        r_high, r_low = _operand(da_r, scale_r, OPERAND, SCALED, SPLIT)
        z_high, z_low = _operand(da_z, scale_z, OPERAND, SCALED, SPLIT)
        n_high, n_low = _operand(dq, scale_n, OPERAND, SCALED, SPLIT)
        # Two buffers take turns, as in the forward pass.
        for c in tl.static_range(CHUNKS):
            acc = tl.zeros([N, CHUNK], tl.float32)
            acc = _multiply(r_high, r_low, w_r[0][c], w_r[1][c], acc, SPLIT)
            acc = _multiply(z_high, z_low, w_z[0][c], w_z[1][c], acc, SPLIT)
            acc = _multiply(n_high, n_low, w_n[0][c], w_n[1][c], acc, SPLIT)
            if SCALED:
                acc *= unscale
            tl.store(mine + (s % 2) * HALF + c * CHUNK, acc)
        _arrive(arrivals_ptr)
        # What no other program waits for comes after the arrival, and hides the exchange's latency.
        row = (t.to(tl.int64) * B + b0) * 2 + d
        _store_gate_gradients(dgi_ptr, dq_ptr, row, offs_gi, offs_y, mask, da_r, da_z, da_n, dq, H)
        t += 2 * d - 1
        dy, r, z, n, q, h_prev = _load_saved(dy_ptr, y_ptr, h0_ptr, gates_ptr, t, s + 1, b0, d, i, b, T, B, H)
        failed = _wait(arrivals_ptr, tl.full([], PROGRAMS, tl.int64) * (s + 1), MAX_POLLS)
        for p in tl.static_range(PROGRAMS):
            dh += _load_exchanged(of_mine + (s % 2) * HALF + p * (N * HP))
        dh = tl.where(failed, float("nan"), dh)
    tl.store(dh0_ptr + offs_h, dh, mask)


@dataclass(frozen=True)
class CooperativeConfig:
    """How one call runs; a launch holds no more programs than the GPU has processors."""

    units: int
    """Hidden units of one program, S."""
    rows: int
    """Batch rows of one group, N."""
    chunk: int
    """Columns of W_hh in one product."""
    programs: int
    """Programs of one group: together they own all hidden units."""
    blocks: int
    """Blocks of batch rows in one launch; a larger batch takes several launches, one after another."""
    directions: int
    """Directions in one launch, 2 or 1."""
    split: bool
    """fp32 products as three of fp16 (high and low parts of both factors, scaled)."""
    max_polls: int = 1 << 22
    """Polls until a wait is given up: far more than any step takes; no program waits that long twice."""
    num_warps: int = 8

    @property
    def padded(self) -> int:
        """H padded to whole chunks."""
        return triton.cdiv(self.programs * self.units, self.chunk) * self.chunk

    def options(self) -> dict[str, int | bool]:
        """What the compiler is told."""
        # Left to itself, ptxas stops at 128 registers in some of these kernels and spills; and with one program a
        # processor, all registers are the program's.
        return {
            "num_warps": self.num_warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True,
            "launch_cooperative_grid": True,
        }  # fmt: skip

    def launches(self, batch: int) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        """First batch row, first direction and grid of each launch that a call takes."""
        all_blocks = triton.cdiv(batch, self.rows)
        for first_block in range(0, all_blocks, self.blocks):
            for first_d in range(0, 2, self.directions):
                blocks = min(self.blocks, all_blocks - first_block)
                yield first_block * self.rows, first_d, (self.programs, blocks, self.directions)


def choose_cooperative(
    hidden: int, dtype: torch.dtype, precision: Precision, batch: int, device: Device
) -> CooperativeConfig:
    """Picks the parameters for what `refusal` does not refuse.

    Args:
        hidden: H.
        dtype: storage dtype, float32, bfloat16 or float16.
        precision: accuracy of the recurrence's products for fp32 storage.
        batch: B.
        device: the GPU.

    Raises:
        ValueError: if `refusal` gives a reason.
    """
    if reason := refusal(hidden, dtype, precision, device):
        raise ValueError(reason)

    def price(config: CooperativeConfig) -> tuple[int, int]:
        # A launch more is T steps more. Among equals, what a program reads at a step: its weights from shared memory,
        # and the state from L2, where a byte is taken as four times as dear, since all processors share its bandwidth.
        parts = 2 if config.split else 1
        weights = 3 * config.units * config.padded * 2 * parts
        return len(list(config.launches(batch))), weights + 4 * config.rows * config.padded * 2 * parts

    return min(_fitting(hidden, dtype, precision, device), key=price)


def refusal(hidden: int, dtype: torch.dtype, precision: str, device: Device) -> str | None:
    """Why these kernels cannot serve H, dtype and precision on a device, or None if they can."""
    if hidden < SMALLEST:
        return f"hidden_size is {hidden}, and the cooperative kernels serve {SMALLEST} and more"
    if not any(True for _ in _fitting(hidden, dtype, precision, device)):
        return (
            f"hidden_size is {hidden}, and W_hh of one direction does not fit the {device.processors} processors at "
            f"once, {device.shared_memory // 1024} KiB each" + (f", under triton {triton.__version__}" * NEWER_TRITON)
        )
    return None


def _fitting(hidden: int, dtype: torch.dtype, precision: str, device: Device) -> Iterator[CooperativeConfig]:
    """The configurations whose programs all find room on the GPU at once, one on each processor."""
    wide = dtype == torch.float32
    split = wide and precision == "fp32"
    # Chunks of 128 where they pad H less. With chunks of 512, or with more units or rows, some kernels spill.
    chunk = 256 if 2 * triton.cdiv(hidden, 256) == triton.cdiv(hidden, 128) else 128
    for units in (32, 16):
        programs = triton.cdiv(hidden, units)
        groups = device.processors // programs
        for rows in (16, 32):
            blocks, directions = max(1, groups // 2), min(2, groups)
            config = CooperativeConfig(units, rows, chunk, programs, blocks, directions, split)
            spills = NEWER_TRITON and wide and units * config.padded > MOST_WIDE
            if groups >= 1 and not spills and _shared_memory(config) <= device.shared_memory:
                yield config


def _shared_memory(config: CooperativeConfig) -> int:
    """Bytes that one program needs, as the kernels compile for sm_80, sm_90 and sm_100, or a little more."""
    weights = 3 * config.units * config.padded * (4 if config.split else 2)
    # The forward kernel's sums over warps, or the tile of the state or of the shares that passes through; from triton
    # 3.9 on, all tiles of the state at once.
    state = config.rows * config.padded * (4 if config.split else 2) if NEWER_TRITON else 0
    return weights + max(config.num_warps * config.rows * config.units * 4, 64 * config.chunk, state)


def forward(
    gi: Tensor,  # (T, B, D, 3H)
    w_hh: Tensor,  # (D, 3H, H)
    b_hn: Tensor | None,  # (D, H)
    h0: Tensor,  # (D, B, H)
    y: Tensor,  # (T, B, D, H), written
    h_n: Tensor,  # (D, B, H), written
    gates: Tensor,  # (T, B, D, 4, H), written; empty if they are not wanted
    c: CooperativeConfig,
) -> None:
    """Launches the forward recurrence on the current GPU, which must be the tensors'; all are contiguous."""
    steps, batch, _, hidden = y.shape
    launches = list(c.launches(batch))
    groups = min(c.blocks, triton.cdiv(batch, c.rows)) * c.directions
    operand = torch.float16 if gi.dtype == torch.float32 else gi.dtype
    # Zeroed once: what lies past the last hidden unit is read and never written.
    state = torch.zeros(groups, 2, 2 if c.split else 1, c.rows, c.padded, dtype=operand, device=gi.device)
    arrivals = torch.zeros(len(launches), groups, COUNTER.value, dtype=torch.int64, device=gi.device)
    for counters, (first_b, first_d, grid) in zip(arrivals, launches, strict=True):
        gru_forward_cooperative_kernel[grid](
            gi, w_hh, gi if b_hn is None else b_hn, h0, y, h_n, gates, state, counters, steps, batch, first_b, first_d,
            H=hidden, S=c.units, N=c.rows, CHUNK=c.chunk, WARPS=c.num_warps, HAS_BIAS=b_hn is not None,
            SAVE=gates.numel() > 0, SPLIT=c.split, MAX_POLLS=c.max_polls, **c.options(),
        )  # fmt: skip


def backward(
    dy: Tensor,  # (T, B, D, H)
    dh_n: Tensor,  # (D, B, H)
    y: Tensor,  # (T, B, D, H)
    gates: Tensor,  # (T, B, D, 4, H)
    h0: Tensor,  # (D, B, H)
    w_hh: Tensor,  # (D, 3H, H)
    dgi: Tensor,  # (T, B, D, 3H), written: gradient of the gates' input side
    dq: Tensor,  # (T, B, D, H), written: gradient of q
    dh0: Tensor,  # (D, B, H), written
    c: CooperativeConfig,
) -> None:
    """Launches the backward recurrence on the current GPU, which must be the tensors'; all are contiguous."""
    steps, batch, _, hidden = y.shape
    launches = list(c.launches(batch))
    groups = min(c.blocks, triton.cdiv(batch, c.rows)) * c.directions
    shares = torch.empty(groups, 2, c.programs, c.rows, c.padded, dtype=torch.float32, device=y.device)
    arrivals = torch.zeros(len(launches), groups, COUNTER.value, dtype=torch.int64, device=y.device)
    for counters, (first_b, first_d, grid) in zip(arrivals, launches, strict=True):
        gru_backward_cooperative_kernel[grid](
            dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, shares, counters, steps, batch, first_b, first_d,
            H=hidden, S=c.units, N=c.rows, CHUNK=c.chunk, SPLIT=c.split, MAX_POLLS=c.max_polls, **c.options(),
        )  # fmt: skip
