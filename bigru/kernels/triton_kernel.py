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
    TRITON_VERSION,
    _cell,
    _cell_backward,
    _dot,
    _extent,
    _load_gates_in,
    _load_saved,
    _peak,
    _present,
    _product,
    _row,
    _store_gate_gradients,
    _store_gates,
)
from bigru.kernels.config import Call, TritonConfig, choose_triton, gpu_refusal
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.launch import Launcher, Launchers, launch_backward, launch_forward
from bigru.kernels.mend import mend
from bigru.kernels.triton_tile import _from_tile, _load_gates_weights, _tile, _to_tile
from bigru.kernels.varlen import steps_and_table


@triton.jit
def _block(UNITS: tl.constexpr, N: tl.constexpr):
    """Returns a program's first batch row and its direction; hidden units as rows and as columns, and batch rows."""
    units = tl.arange(0, UNITS)
    return tl.program_id(0) * N, tl.program_id(1), units[:, None], units[None, :], tl.arange(0, N)[None, :]


@triton.jit(do_not_specialize=SIZES)
def gru_forward_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, h0_ptr, y_ptr, h_n_ptr, gates_ptr, varlen_ptr, T, B, H: tl.constexpr, HP: tl.constexpr,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    b0, d, j, k, _ = _block(HP, N)
    w_r, w_z, w_n = _load_gates_weights(
        w_hh_ptr + d * (3 * H * H) + j * H + k, (j < H) & (k < H), H, HP, SPLIT, BATCHED
    )
    j, b = _tile(HP, N)
    mask = (j < H) & (b0 + b < B)
    b_hn = 0.0
    if HAS_BIAS:
        b_hn = tl.load(b_hn_ptr + d * H + j, j < H, 0.0).to(tl.float32)

    offs_gi = b * (2 * 3 * H) + j
    offs_y = b * (2 * H) + j
    offs_gates = b * (2 * 4 * H) + j
    offs_h = (d.to(tl.int64) * B + b0) * H + b * H + j
    h = tl.load(h0_ptr + offs_h, mask, 0.0).to(tl.float32)
    scale, unscale = 1.0, 1.0
    if SPLIT:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        peak = tl.maximum(_peak(_from_tile(h, HP, N), 0), 1.0)[None, :]
        scale = 1024.0 / peak
        unscale = peak * (1.0 / 1024.0)

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
        x = _from_tile(h, HP, N) * scale
        h_r = _to_tile(_product(w_r, x, unscale, SPLIT, PRECISION), HP, N)
        h_z = _to_tile(_product(w_z, x, unscale, SPLIT, PRECISION), HP, N)
        q = _to_tile(_product(w_n, x, unscale, SPLIT, PRECISION), HP, N) + b_hn
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
    BATCHED: tl.constexpr,
):  # fmt: skip
    b0, d, i, k, _ = _block(HP, N)
    # Transposed: element (i, k) of the operand is w_hh[gate, k, i].
    w_r, w_z, w_n = _load_gates_weights(
        w_hh_ptr + d * (3 * H * H) + k * H + i, (i < H) & (k < H), H, HP, SPLIT, BATCHED
    )
    i, b = _tile(HP, N)
    mask = (i < H) & (b0 + b < B)

    offs_gi = b * (2 * 3 * H) + i
    offs_y = b * (2 * H) + i
    offs_h = (d.to(tl.int64) * B + b0) * H + b * H + i
    dh = tl.load(dh_n_ptr + offs_h, mask, 0.0).to(tl.float32)

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
        x_r, x_z, x_n = _from_tile(da_r, HP, N), _from_tile(da_z, HP, N), _from_tile(dq, HP, N)
        unscale = 1.0
        if SPLIT:
            # Gradients have no bound, so each batch row is scaled by its own largest one.
            peak = _peak(tl.maximum(tl.maximum(tl.abs(x_r), tl.abs(x_z)), tl.abs(x_n)), 0)[None, :]
            scale = 1024.0 / peak
            x_r, x_z, x_n = x_r * scale, x_z * scale, x_n * scale
            unscale = peak * (1.0 / 1024.0)
        dh += _to_tile(_product(w_r, x_r, unscale, SPLIT, PRECISION), HP, N)
        dh += _to_tile(_product(w_z, x_z, unscale, SPLIT, PRECISION), HP, N)
        dh += _to_tile(_product(w_n, x_n, unscale, SPLIT, PRECISION), HP, N)
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
    b0, d, rows, columns, b = _block(BH, N)
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
    b0, d, rows, columns, b = _block(BH, N)
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


FORWARD, BACKWARD = Launcher(gru_forward_kernel), Launcher(gru_backward_kernel)
FORWARD_STREAMED, BACKWARD_STREAMED = Launcher(gru_forward_streamed_kernel), Launcher(gru_backward_streamed_kernel)


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """Serves every H, sequences of different lengths, and CPU tensors in Triton's interpreter."""

    name = "triton"
    widths = (16, 32, 64, 100, 128, 200)  # each padded size, and two that need padding
    varlen_widths = (16, 128, 200)  # least and most that is persistent, and one that is streamed
    interpreted: bool = INTERPRETED
    """True if the kernels run in Triton's interpreter, on CPU tensors."""
    triton_version: tuple[int, ...] = TRITON_VERSION

    def refusal(self, call: Call) -> str | None:
        return gpu_refusal(call, self.interpreted)

    def choose(self, call: Call, batch: int) -> TritonConfig:
        return choose_triton(call, batch, self.triton_version > (3, 6))

    def forward(self, operands: Forward, config: TritonConfig) -> None:
        if config.persistent:
            launch_forward(FORWARD, operands, config, ACCURATE=config.accurate)
            if config.split:
                mend(operands)
            return
        gi, w_hh, b_hn, h0, y, h_n, gates, varlen, _ = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        state = torch.empty((2, *h0.shape), dtype=torch.float32, device=gi.device)
        state.copy_(h0)
        tensors = gi, w_hh, gi if b_hn is None else b_hn, state, y, y if gates is None else gates, table
        launch = FORWARD_STREAMED.prepare(
            config, varlen is not None, gi.dtype, gi.get_device(), H=hidden, HAS_BIAS=b_hn is not None,
            SAVE=gates is not None, ACCURATE=config.accurate,
        )  # fmt: skip
        launch((-(-batch // config.rows), 2, 1), tensors, (steps, batch, hidden))
        h_n.copy_(state[steps % 2])

    def backward(self, operands: Backward, config: TritonConfig) -> None:
        if config.persistent:
            launch_backward(BACKWARD, operands, config)
            return
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen, h_prev = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        dh = dh_n.to(torch.float32, copy=True)
        tensors = dy, y, gates, h0, w_hh, dh, dgi, dq, table, h_prev
        launch = BACKWARD_STREAMED.prepare(config, varlen is not None, y.dtype, y.get_device(), H=hidden)
        launch((-(-batch // config.rows), 2, 1), tensors, (steps, batch, hidden))
        dh0.copy_(dh)

    def launchers(self, config: TritonConfig, hidden: int) -> Launchers | None:
        if not config.persistent:
            return None
        return Launchers(FORWARD, {"ACCURATE": config.accurate}, BACKWARD, (1, hidden) if config.split else None)

    def functions(self, config: TritonConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        if config.persistent:
            return {"forward": (gru_forward_kernel, {}), "backward": (gru_backward_kernel, {})}
        return {
            "forward": (gru_forward_streamed_kernel, {"state_ptr": "*fp32"}),
            "backward": (gru_backward_streamed_kernel, {"dh_ptr": "*fp32"}),
        }


KERNEL = TritonKernel()
