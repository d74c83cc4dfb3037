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

Sequences of different lengths lie as in `bigru.kernels.triton_kernel`. A group makes as many steps as its longest
sequence has; its programs agree on that, since they serve the same rows.

Products have batch rows as their short side: h[N, H] @ W_hh^T[H, S] and da[N, S] @ W_hh[S, H]. For fp32 storage their
factors are scaled fp16, two parts of each for precision "fp32" (as in `bigru.kernels.cell`) and one for "tf32",
which has TF32's ten bits of mantissa at half its bytes. State, accumulation and element-wise arithmetic are fp32.
Offsets inside one time step are 32-bit, the step's own offset is 64-bit.

Pointers are to the operands that `bigru.kernels.kernel` describes, to `Varlen.table` or None, and to what a launch's
groups exchange: `state_ptr` (groups, 2, parts, N * padded H) of the products' dtype, in the order of `_places`, and
`arrivals_ptr` (groups, COUNTER) int64, both zero on entry, and `shares_ptr` (groups, 2, PROGRAMS, N, padded H) fp32.
b_hn is not touched unless HAS_BIAS, the gates not unless SAVE. S are the hidden units of a program, N the rows of a
group, CHUNK the columns of W_hh in one product, of which each of WARPS multiplies a part; first_b and first_d are a
launch's first row and direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigru.kernels.cell import (
    _cell,
    _cell_backward,
    _extent,
    _load_gates_in,
    _load_saved,
    _peak,
    _present,
    _row,
    _store_gate_gradients,
    _store_gates,
)
from bigru.kernels.config import (
    ONE_PROCESSOR,
    Call,
    CooperativeConfig,
    choose_cooperative,
    cooperative_configs,
    gpu_refusal,
)
from bigru.kernels.exchange import (
    _arrive,
    _load_exchanged,
    _load_gates_rows,
    _load_state,
    _multiply,
    _operand,
    _peaks,
    _places,
    _publish_state,
    _state_product,
    _sum_gates,
    _wait,
)
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.launch import Launcher
from bigru.kernels.mend import mend
from bigru.kernels.varlen import steps_and_table

SIZES = ("T", "B", "first_b", "first_d")
"""Arguments that a kernel is not compiled anew for, as in `cell`."""
COUNTER = tl.constexpr(16)
"""64-bit integers from one group's count to the next: each in a cache line of its own."""


@triton.jit(do_not_specialize=SIZES)
def gru_forward_cooperative_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, h0_ptr, y_ptr, h_n_ptr, gates_ptr, state_ptr, arrivals_ptr, varlen_ptr, T, B, first_b,
    first_d, H: tl.constexpr, S: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr,
    JOINED: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, SPLIT: tl.constexpr, MAX_POLLS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    HP: tl.constexpr = CHUNKS * CHUNK
    SCALED: tl.constexpr = w_hh_ptr.dtype.element_ty == tl.float32
    PROGRAMS: tl.constexpr = (H + S - 1) // S
    HALF: tl.constexpr = (2 if SPLIT else 1) * N * HP
    b0 = first_b + tl.program_id(1) * N
    d = first_d + tl.program_id(2)
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    units = tl.program_id(0) * S + tl.arange(0, S)
    j = units[None, :]
    b = tl.arange(0, N)[:, None]
    mask = (j < H) & (b0 + b < B)

    # Columns by warp: (WARPS, CHUNK / WARPS).
    k = tl.arange(0, WARPS)[:, None] * (CHUNK // WARPS) + tl.arange(0, CHUNK // WARPS)[None, :]
    w = w_hh_ptr + d * (3 * H * H)
    peaks = _peaks(w, units[None, None, :], k[:, :, None], H, CHUNK, CHUNKS)
    offs_gi = b * (2 * 3 * H) + j
    offs_y = b * (2 * H) + j
    offs_gates = b * (2 * 4 * H) + j
    offs_h = b * H
    h0_ptr += (d.to(tl.int64) * B + b0) * H
    h_n_ptr += (d.to(tl.int64) * B + b0) * H
    h = tl.load(h0_ptr + offs_h + j, mask, 0.0).to(tl.float32)
    scale = 1.0
    unscale = 1.0
    if SCALED:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        h_peak = tl.full([N], 1.0, tl.float32)
        for c in tl.static_range(CHUNKS):
            column = c * CHUNK + tl.arange(0, CHUNK)[None, :]
            h0 = tl.load(h0_ptr + offs_h + column, (b0 + b < B) & (column < H), 0.0)
            h_peak = tl.maximum(h_peak, _peak(h0, 1))
        scale = (1024.0 / h_peak)[:, None]
        unscale = (h_peak * (1.0 / (1024.0 * 1024.0)))[:, None]

    # Two buffers take turns. A program that writes one at step s + 1 has waited for all arrivals of step s, each of
    # which came after that program's loads of step s - 1 from the same buffer.
    arrivals_ptr += group * COUNTER
    state_ptr += group * (2 * HALF)
    mine = _places(b, j, N, CHUNK, WARPS)
    _publish_state(state_ptr + mine, h, scale, N * HP, SCALED, SPLIT)
    _arrive(arrivals_ptr)
    # Loaded last: triton 3.9 moves the weights to shared memory where the loop begins, and loads them no earlier than
    # that unless there are barriers in between, over which it would keep them all in registers.
    w_r, w_z, w_n = _load_gates_rows(w, units[None, None, :], k[:, :, None], peaks, H, CHUNK, CHUNKS, SPLIT)
    b_hn = tl.zeros([N, S], tl.float32)
    if HAS_BIAS:
        # As large as what it is added to, whose threads would otherwise be others.
        b_hn = tl.load(b_hn_ptr + d * H + j.broadcast_to([N, S]), (j < H).broadcast_to([N, S]), 0.0).to(tl.float32)
    extent, start = _extent(varlen_ptr, b0, b, T, B)
    steps = T - start
    t = d * (steps - 1)
    for s in range(steps):
        # Loads that wait for no other program go before the wait, and hide their latency behind it.
        row = _row(varlen_ptr, t, b0, d, T, B)
        present = (j < H) & _present(varlen_ptr, extent, t, b, True)
        i_r, i_z, i_n = _load_gates_in(gi_ptr, row, offs_gi, present, H)
        failed = _wait(arrivals_ptr, tl.full([], PROGRAMS, tl.int64) * (s + 1), MAX_POLLS)
        x = _load_state(state_ptr + (s % 2) * HALF, N * HP, N, CHUNK, CHUNKS, WARPS, SPLIT)
        h_r = _state_product(x, w_r, WARPS, N, S, CHUNKS, SPLIT, JOINED)
        h_z = _state_product(x, w_z, WARPS, N, S, CHUNKS, SPLIT, JOINED)
        q = _state_product(x, w_n, WARPS, N, S, CHUNKS, SPLIT, JOINED)
        if JOINED:
            h_r, h_z, q = _sum_gates(h_r, h_z, q, WARPS, N, S)
        if SCALED:
            h_r *= unscale * peaks[0]
            h_z *= unscale * peaks[1]
            q *= unscale * peaks[2]
        q += b_hn
        h = tl.where(failed, float("nan"), h)
        r, z, n, h_new = _cell(i_r, i_z, i_n, h_r, h_z, q, h, SPLIT)
        # A sequence without a row at this step keeps its state.
        h = h_new if varlen_ptr is None else tl.where(t < extent, h_new, h)
        _publish_state(state_ptr + ((s + 1) % 2) * HALF + mine, h, scale, N * HP, SCALED, SPLIT)
        _arrive(arrivals_ptr)
        # What no other program waits for comes after the arrival, and hides the exchange's latency.
        tl.store(y_ptr + row * H + offs_y, h, present)
        if SAVE:
            _store_gates(gates_ptr, row, offs_gates, present, r, z, n, q, H)
        t += 1 - 2 * d
    tl.store(h_n_ptr + offs_h + j, h, mask)


@triton.jit(do_not_specialize=SIZES)
def gru_backward_cooperative_kernel(
    dy_ptr, dh_n_ptr, y_ptr, gates_ptr, h0_ptr, w_hh_ptr, dgi_ptr, dq_ptr, dh0_ptr, shares_ptr, arrivals_ptr,
    varlen_ptr, h_prev_ptr, T, B, first_b, first_d, H: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr, MAX_POLLS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    HP: tl.constexpr = CHUNKS * CHUNK
    PROGRAMS: tl.constexpr = (H + S - 1) // S
    SCALED: tl.constexpr = w_hh_ptr.dtype.element_ty == tl.float32
    OPERAND: tl.constexpr = tl.float16 if SCALED else w_hh_ptr.dtype.element_ty
    HALF: tl.constexpr = PROGRAMS * N * HP
    b0 = first_b + tl.program_id(1) * N
    d = first_d + tl.program_id(2)
    group = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    units = tl.program_id(0) * S + tl.arange(0, S)
    i = units[None, :]
    k = tl.arange(0, CHUNK)[None, :]
    b = tl.arange(0, N)[:, None]
    mask = (i < H) & (b0 + b < B)
    w = w_hh_ptr + d * (3 * H * H)
    peaks = _peaks(w, units[:, None], k, H, CHUNK, CHUNKS)
    w_r, w_z, w_n = _load_gates_rows(w, units[:, None], k, peaks, H, CHUNK, CHUNKS, SPLIT)
    w_peak = 1.0
    if SCALED:
        w_peak = tl.maximum(tl.maximum(peaks[0], peaks[1]), peaks[2])

    offs_gi = b * (2 * 3 * H) + i
    offs_y = b * (2 * H) + i
    offs_h = (d.to(tl.int64) * B + b0) * H + b * H + i
    dh = tl.load(dh_n_ptr + offs_h, mask, 0.0).to(tl.float32)
    arrivals_ptr += group * COUNTER
    shares_ptr += group * (2 * HALF)
    mine = shares_ptr + tl.program_id(0) * (N * HP) + b * HP + k
    of_mine = shares_ptr + b * HP + i
    extent, start = _extent(varlen_ptr, b0, b, T, B)
    steps = T - start
    t = (1 - d) * (steps - 1)
    row = _row(varlen_ptr, t, b0, d, T, B)
    row_prev = _row(varlen_ptr, t + 2 * d - 1, b0, d, T, B)
    dy, r, z, n, q, h_prev = _load_saved(
        dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row, row_prev, t, 0, steps, b0, d, i, b, extent, B, H
    )
    for s in range(steps):
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
            scale_r = (1024.0 / a_peak) * (peaks[0] / w_peak)
            scale_z = (1024.0 / a_peak) * (peaks[1] / w_peak)
            scale_n = (1024.0 / a_peak) * (peaks[2] / w_peak)
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
        present = (i < H) & _present(varlen_ptr, extent, t, b, True)
        _store_gate_gradients(dgi_ptr, dq_ptr, row, offs_gi, offs_y, present, da_r, da_z, da_n, dq, H)
        if h_prev_ptr is not None:
            tl.store(h_prev_ptr + row * H + offs_y, h_prev, present)
        t += 2 * d - 1
        row = row_prev
        row_prev = _row(varlen_ptr, t + 2 * d - 1, b0, d, T, B)
        dy, r, z, n, q, h_prev = _load_saved(
            dy_ptr, y_ptr, h0_ptr, gates_ptr, varlen_ptr, row, row_prev, t, s + 1, steps, b0, d, i, b, extent, B, H
        )
        failed = _wait(arrivals_ptr, tl.full([], PROGRAMS, tl.int64) * (s + 1), MAX_POLLS)
        for p in tl.static_range(PROGRAMS):
            dh += _load_exchanged(of_mine + (s % 2) * HALF + p * (N * HP))
        dh = tl.where(failed, float("nan"), dh)
    tl.store(dh0_ptr + offs_h, dh, mask)


FORWARD, BACKWARD = Launcher(gru_forward_cooperative_kernel), Launcher(gru_backward_cooperative_kernel)


@dataclass(frozen=True)
class CooperativeKernel(Kernel):
    """Serves H from 129, as far as W_hh of one direction fits the GPU's multiprocessors."""

    name = "cooperative"
    widths = (192, 256, 512, 1024)  # with padding and without, few programs and many
    varlen_widths = (192, 512, 1024)
    batches = (64,)

    def refusal(self, call: Call) -> str | None:
        if reason := gpu_refusal(call):
            return reason
        if call.hidden <= ONE_PROCESSOR:
            return f"hidden_size is {call.hidden}, and the cooperative kernels serve {ONE_PROCESSOR + 1} and more"
        if next(cooperative_configs(call), None) is None:
            return (
                f"hidden_size is {call.hidden}, and W_hh of one direction does not fit the {call.device.processors} "
                f"processors at once, {call.device.shared_memory // 1024} KiB each"
            )
        return None

    def choose(self, call: Call, batch: int) -> CooperativeConfig:
        return choose_cooperative(call, batch)

    def forward(self, operands: Forward, config: CooperativeConfig) -> None:
        gi, w_hh, b_hn, h0, y, h_n, gates, varlen, _ = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        tensors = gi, w_hh, gi if b_hn is None else b_hn, h0, y, h_n, y if gates is None else gates
        operand = torch.float16 if gi.dtype == torch.float32 else gi.dtype
        # Zeroed once: what lies past the last hidden unit is read and never written.
        state = gi.new_zeros(
            config.groups(batch), 2, 2 if config.split else 1, config.rows * config.padded, dtype=operand
        )
        launch = FORWARD.prepare(
            config, varlen is not None, gi.dtype, gi.get_device(), H=hidden, WARPS=config.num_warps,
            JOINED=config.joined, HAS_BIAS=b_hn is not None, SAVE=gates is not None,
        )  # fmt: skip
        for arrivals, first_b, first_d, grid in _launches(config, h0):
            launch(grid, (*tensors, state, arrivals, table), (steps, batch, first_b, first_d))
        mend(operands)

    def backward(self, operands: Backward, config: CooperativeConfig) -> None:
        *tensors, varlen, h_prev = operands
        _, batch, hidden = operands.h0.shape
        steps, table = steps_and_table(operands.y, varlen)
        shape = config.groups(batch), 2, config.programs, config.rows, config.padded
        shares = torch.empty(shape, dtype=torch.float32, device=operands.y.device)
        y = operands.y
        launch = BACKWARD.prepare(config, varlen is not None, y.dtype, y.get_device(), H=hidden)
        for arrivals, first_b, first_d, grid in _launches(config, operands.h0):
            launch(grid, (*tensors, shares, arrivals, table, h_prev), (steps, batch, first_b, first_d))

    def functions(self, config: CooperativeConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        # The state is exchanged in the products' dtype.
        return {
            "forward": (gru_forward_cooperative_kernel, {"arrivals_ptr": "*i64", "state_ptr": "operand"}),
            "backward": (gru_backward_cooperative_kernel, {"shares_ptr": "*fp32", "arrivals_ptr": "*i64"}),
        }


def _launches(config: CooperativeConfig, h0: Tensor) -> Iterator[tuple[Tensor, int, int, tuple[int, int, int]]]:
    """Yields counts of arrivals, all zero, and what `CooperativeConfig.launches` says, for each launch of a call."""
    launches = list(config.launches(h0.shape[1]))
    groups = config.groups(h0.shape[1])
    counts = torch.zeros(len(launches), groups, COUNTER.value, dtype=torch.int64, device=h0.device)
    for arrivals, launch in zip(counts, launches, strict=True):
        yield arrivals, *launch


KERNEL = CooperativeKernel()
