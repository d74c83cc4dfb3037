"""The backend "triton": both directions in one launch, on any GPU that Triton supports and in its interpreter.

One program serves a block of batch rows and one direction, with the time loop inside. Matrix products are transposed,
gates^T[H, N] = W_hh[H, H] @ h^T[H, N], so that a small batch block N still fills the tensor cores: hidden units are the
long side. Up to H = 128 the recurrent weights are *persistent*, loaded once and on chip for the whole sequence, and the
state is in registers. Above they are *streamed*: blocks of W_hh, BH hidden units wide, are read at every step (from the
L2 cache, as a rule), and the state passes from step to step through a small fp32 buffer that only its own program
touches: `state_ptr`, (2, D, B, H), which holds h0 twice on entry and h_n in [T % 2] on return, or `dh_ptr`, (D, B, H),
dh_n on entry and dh0 on return.

Each kernel also takes a batch of sequences of different lengths as a PackedSequence lays it out: P rows, step by step,
where step t has rows only for the sequences longer than t, the longest first; (T, B, ...) then means (P, ...).
`varlen_ptr` holds each sequence's length and each step's first row. A program makes as many steps as its longest
sequence has; a sequence without a row at a step keeps its state, or its gradient, so that direction 1 starts at each
sequence's own end. Where `varlen_ptr` is None nothing of this is compiled.

Pointers are to the operands that `bigru.kernels.kernel` describes, `varlen_ptr` is to `Varlen.table` or None. b_hn is
not touched unless HAS_BIAS, the gates not unless SAVE. HP is H padded to a power of two, N the rows of a program, and
`hidden` H once more: loops bounded by a constant would be unrolled, and their values spilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bigru.kernels.cell import (
    INTERPRETED,
    SIZES,
    _cell,
    _cell_backward,
    _dot,
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
from bigru.kernels.config import Call, TritonConfig, choose_triton, gpu_refusal
from bigru.kernels.kernel import Backward, Forward, Kernel, launch_backward, launch_forward
from bigru.kernels.varlen import steps_and_table


@triton.jit
def _tile(UNITS: tl.constexpr, N: tl.constexpr):
    """Returns a program's first batch row and its direction; hidden units as rows and as columns, and batch rows."""
    units = tl.arange(0, UNITS)
    return tl.program_id(0) * N, tl.program_id(1), units[:, None], units[None, :], tl.arange(0, N)[None, :]


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
    b0, d, j, k, b = _tile(HP, N)
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
    b0, d, i, k, b = _tile(HP, N)
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
    b0, d, rows, columns, b = _tile(BH, N)
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
    b0, d, rows, columns, b = _tile(BH, N)
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


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """Serves every H, sequences of different lengths, and CPU tensors in Triton's interpreter."""

    name = "triton"
    widths = (16, 32, 64, 100, 128, 200)  # each padded size, and two that need padding
    varlen_widths = (16, 128, 200)  # least and most that is persistent, and one that is streamed
    interpreted: bool = INTERPRETED
    """True if the kernels run in Triton's interpreter, on CPU tensors."""

    def refusal(self, call: Call) -> str | None:
        return gpu_refusal(call, self.interpreted)

    def choose(self, call: Call, batch: int) -> TritonConfig:
        return choose_triton(call, batch)

    def forward(self, operands: Forward, config: TritonConfig) -> None:
        if config.persistent:
            launch_forward(gru_forward_kernel, operands, config, ACCURATE=config.accurate)
            return
        gi, w_hh, b_hn, h0, y, h_n, gates, varlen = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        state = torch.empty((2, *h0.shape), dtype=torch.float32, device=gi.device)
        state.copy_(h0)
        gru_forward_streamed_kernel[-(-batch // config.rows), 2](
            gi, w_hh, gi if b_hn is None else b_hn, state, y, gates, table, steps, batch, hidden, H=hidden,
            HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0, ACCURATE=config.accurate, **config.constants(),
            **config.options(varlen is not None),
        )  # fmt: skip
        h_n.copy_(state[steps % 2])

    def backward(self, operands: Backward, config: TritonConfig) -> None:
        if config.persistent:
            launch_backward(gru_backward_kernel, operands, config)
            return
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen, h_prev = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        dh = dh_n.to(torch.float32, copy=True)
        gru_backward_streamed_kernel[-(-batch // config.rows), 2](
            dy, y, gates, h0, w_hh, dh, dgi, dq, table, h_prev, steps, batch, hidden, H=hidden, **config.constants(),
            **config.options(varlen is not None),
        )  # fmt: skip
        dh0.copy_(dh)

    def functions(self, config: TritonConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        if config.persistent:
            return {"forward": (gru_forward_kernel, {}), "backward": (gru_backward_kernel, {})}
        return {
            "forward": (gru_forward_streamed_kernel, {"state_ptr": "*fp32"}),
            "backward": (gru_backward_streamed_kernel, {"dh_ptr": "*fp32"}),
        }


KERNEL = TritonKernel()
