"""The recurrence with W_hh resident in registers, as Gluon kernels for warp-level MMA (compute capability 8.0 on).

As in `bigru.kernels.portable`, one program serves a block of batch rows and one direction, the products are transposed,
gates^T[H, N] = W_hh[H, H] @ h^T[H, N], and the time loop is inside. What differs is where things lie:

- W_hh (backward: its transpose) is the A operand of the MMAs and stays in registers for the whole sequence; a warp owns
  16 hidden units of every gate, so that r, z, n, q and h of a unit meet in one thread;
- the state (backward: the gates' gradients) goes from step to step through shared memory, in two buffers that take
  turns, at one barrier a step;
- global memory is read and written in the accumulator's own layout, two hidden units at once, so that no step moves a
  value between threads other than through that buffer.

fp32 storage with precision "fp32" takes both factors as two scaled fp16 parts. The parts of the state lie side by
side as two columns of one operand: W_high @ [h_high, h_low] + W_low @ [h_high, h_low] is all four products in two
passes, and the two columns of a batch row end in the same thread. Precision "tf32" takes scaled fp16 alone, which has
TF32's ten bits of mantissa at half its registers and half its MMAs.

Hidden units and batch rows past the end repeat the last one: they read what it reads, compute what it computes and
store the same values to the same places, so that no step needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigru.kernels.cell import SIZES
from bigru.kernels.config import ONE_PROCESSOR, Call, ResidentConfig, choose_resident, gpu_refusal
from bigru.kernels.kernel import Kernel
from bigru.kernels.proven import Proven, proven_for
from bigru.kernels.resident_tiles import (
    _accumulator,
    _buffer,
    _indices,
    _inverse,
    _load_gates_in,
    _load_operands,
    _multiply,
    _put,
    _quads,
    _row,
    _scale_of,
    _sigmoid,
    _store_state,
    _tanh,
    _to_units,
    _units,
)
from bigru.kernels.varlen import Varlen


@gluon.jit
def _forward_step(
    pointers, read, write, h, gates_in, weights, b_hn, scales, t, t_next, place, offs, H: gl.constexpr,
    HP: gl.constexpr, N: gl.constexpr, SAVE: gl.constexpr, SPLIT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """One step: the state comes from one buffer and goes to the other; returns it and the next step's input gates."""
    gi_ptr, y_ptr, gates_ptr = pointers
    w_r, w_z, w_n = weights
    scale, unscale = scales
    offs_gi, offs_y, offs_gates = offs
    ACC: gl.constexpr = _accumulator(HP)
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    x = read.permute((1, 0)).load(gl.DotOperandLayout(1, ACC, 2))
    zero = gl.zeros([HP, COLUMNS], gl.float32, ACC)
    h_r = _to_units(_multiply(w_r, x, zero, SPLIT), HP, N, SPLIT) * unscale
    h_z = _to_units(_multiply(w_z, x, zero, SPLIT), HP, N, SPLIT) * unscale
    q = _to_units(_multiply(w_n, x, zero, SPLIT), HP, N, SPLIT) * unscale + b_hn
    r = _sigmoid(gates_in[0].to(gl.float32) + h_r, not SPLIT)
    z = _sigmoid(gates_in[1].to(gl.float32) + h_z, not SPLIT)
    n = _tanh(gates_in[2].to(gl.float32) + r * q, not SPLIT)
    # Asked for now, into the registers of this step's; the next step's products hide the latency.
    gates_in = _load_gates_in(gi_ptr, _row(t_next, place), offs_gi, H)
    h = n + z * (h - n)
    _put(write, h * scale, OPERAND, HP, N, SPLIT)
    row = _row(t, place)
    gl.store(y_ptr + row * H + offs_y, h.to(y_ptr.dtype.element_ty))
    if SAVE:
        quads = gl.join(gl.join(r, n), gl.join(z, q)).permute([0, 2, 3, 1]).reshape([4 * HP, N])
        quads = gl.convert_layout(quads, _quads(HP, N, SPLIT))
        gl.store(gates_ptr + row * (4 * H) + offs_gates, quads.to(gates_ptr.dtype.element_ty))
    return h, gates_in


@gluon.jit(do_not_specialize=SIZES)
def gru_forward_resident_kernel(
    gi_ptr,  # (T, B, D, 3H)
    w_hh_ptr,  # (D, 3H, H)
    b_hn_ptr,  # (D, H); not touched unless HAS_BIAS
    h0_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    h_n_ptr,  # (D, B, H)
    gates_ptr,  # (T, B, D, H, 4), r, z, n, q; not touched unless SAVE
    T,
    B,
    H: gl.constexpr,
    HP: gl.constexpr,  # H padded to a power of two; a warp for every 16
    N: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SAVE: gl.constexpr,
    SPLIT: gl.constexpr,
):
    UNITS: gl.constexpr = _units(HP, N, SPLIT)
    QUADS: gl.constexpr = _quads(HP, N, SPLIT)
    SCALED: gl.constexpr = gi_ptr.dtype.element_ty == gl.float32
    OPERAND: gl.constexpr = gl.float16 if SCALED else gi_ptr.dtype.element_ty
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    b0 = gl.program_id(0) * N
    d = gl.program_id(1)
    w = w_hh_ptr + d * (3 * H * H)
    w_r, w_z, w_n, w_scale = _load_operands(w, H, 1, H, HP)
    j, b = _indices(B, b0, H, UNITS, 1)
    jg, bg = _indices(B, b0, H, QUADS, 4)
    offs_gi, offs_y, offs_gates = b * (6 * H) + j, b * (2 * H) + j, bg * (8 * H) + jg
    h = gl.load(h0_ptr + (d.to(gl.int64) * B + b0) * H + (b * H + j)).to(gl.float32)
    b_hn = gl.zeros([HP, N], gl.float32, UNITS)
    if HAS_BIAS:
        b_hn += gl.load(b_hn_ptr + d * H + j).to(gl.float32)
    scale = 1.0
    unscale = 1.0
    if SCALED:
        # Every state lies between its predecessor and n, so a row never exceeds its largest initial state or 1.
        scale = _scale_of(gl.maximum(gl.max(gl.abs(h), 0), 1.0))[None, :]
        unscale = _inverse(scale) * _inverse(w_scale)
    # Two allocations rather than one with an index: so it is plain that a step's two accesses never meet.
    even = gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP))
    odd = gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP))

    pointers, weights, scales = (gi_ptr, y_ptr, gates_ptr), (w_r, w_z, w_n), (scale, unscale)
    place, offs = (B, b0, d), (offs_gi, offs_y, offs_gates)
    t = d * (T - 1)
    step = 1 - 2 * d
    gates_in = _load_gates_in(gi_ptr, _row(t, place), offs_gi, H)
    if T % 2 == 1:
        _put(odd, h * scale, OPERAND, HP, N, SPLIT)
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        h, gates_in = _forward_step(
            pointers, odd, even, h, gates_in, weights, b_hn, scales, t, t_next, place, offs,
            H, HP, N, SAVE, SPLIT, OPERAND,
        )  # fmt: skip
        t += step
    else:
        _put(even, h * scale, OPERAND, HP, N, SPLIT)
    for _ in range(T // 2):
        h, gates_in = _forward_step(
            pointers, even, odd, h, gates_in, weights, b_hn, scales, t, t + step, place, offs,
            H, HP, N, SAVE, SPLIT, OPERAND,
        )  # fmt: skip
        t += step
        # There is nothing after the last step, so it asks for its own input gates once more.
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        h, gates_in = _forward_step(
            pointers, odd, even, h, gates_in, weights, b_hn, scales, t, t_next, place, offs,
            H, HP, N, SAVE, SPLIT, OPERAND,
        )  # fmt: skip
        t += step
    d = gl.where(t < 0, 1, 0)
    _store_state(h_n_ptr, h, offs_y, B, b0, d, H)


@gluon.jit
def _load_saved(sources, t, step, T, place, indices, H: gl.constexpr):
    """What a backward step at t reads: dy, the four gates, and the state before it, which is h0 at the first t."""
    dy_ptr, y_ptr, gates_ptr, h0_ptr = sources
    j, b, offs_gates = indices
    B, b0, d = place
    row = _row(t, place)
    dy = gl.load(dy_ptr + row * H + (b * (2 * H) + j))
    quads = gl.load(gates_ptr + row * (4 * H) + offs_gates)
    t_prev = t + step
    inside = (t_prev >= 0) & (t_prev < T)
    source = y_ptr + _row(t_prev, place) * H
    source = source if inside else h0_ptr + (d.to(gl.int64) * B + b0) * H
    h_prev = gl.load(source + (b * (2 * H if inside else H) + j))
    return dy, quads, h_prev


@gluon.jit
def _of_quads(quads, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """r, z, n, q in fp32 by unit and batch row."""
    UNITS: gl.constexpr = _units(HP, N, SPLIT)
    r_n, z_q = gl.split(quads.to(gl.float32).reshape([HP, 2, 2, N]).permute([0, 3, 1, 2]))
    r, n = gl.split(r_n)
    z, q = gl.split(z_q)
    return (
        gl.convert_layout(r, UNITS), gl.convert_layout(z, UNITS), gl.convert_layout(n, UNITS),
        gl.convert_layout(q, UNITS),
    )  # fmt: skip


@gluon.jit
def _backward_step(
    sources, targets, buffers, dh, saved, weights, w_unscale, t, t_next, step, T, place, indices, H: gl.constexpr,
    HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr, OPERAND: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """One step back; returns the gradient of the state before it and what the next step reads."""
    dgi_ptr, dq_ptr = targets
    w_r, w_z, w_n = weights
    j, b, _ = indices
    ACC: gl.constexpr = _accumulator(HP)
    COLUMN: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    dh += saved[0].to(gl.float32)
    r, z, n, q = _of_quads(saved[1], HP, N, SPLIT)
    da_n = dh * (1.0 - z) * (1.0 - n * n)
    da_z = dh * (saved[2].to(gl.float32) - n) * z * (1.0 - z)
    da_r = da_n * q * r * (1.0 - r)
    dq = da_n * r
    dh *= z
    # Asked for now, into the registers of this step's; the products hide the latency.
    saved = _load_saved(sources, t_next, step, T, place, indices, H)
    scale = 1.0
    unscale = 1.0
    if SCALED:
        # Gradients have no bound, so each batch row is scaled by its own largest one.
        peak = gl.maximum(gl.maximum(gl.abs(da_r), gl.abs(da_z)), gl.abs(dq))
        scale = _scale_of(gl.max(peak, 0))[None, :]
        unscale = _inverse(scale) * w_unscale
    _put(buffers[0], da_r * scale, OPERAND, HP, N, SPLIT)
    _put(buffers[1], da_z * scale, OPERAND, HP, N, SPLIT)
    _put(buffers[2], dq * scale, OPERAND, HP, N, SPLIT)
    dgi = dgi_ptr + _row(t, place) * (3 * H) + (b * (6 * H) + j)
    gl.store(dgi, da_r.to(dgi_ptr.dtype.element_ty))
    gl.store(dgi + H, da_z.to(dgi_ptr.dtype.element_ty))
    gl.store(dgi + 2 * H, da_n.to(dgi_ptr.dtype.element_ty))
    gl.store(dq_ptr + _row(t, place) * H + (b * (2 * H) + j), dq.to(dq_ptr.dtype.element_ty))
    acc = gl.zeros([HP, COLUMNS], gl.float32, ACC)
    acc = _multiply(w_r, buffers[0].permute((1, 0)).load(COLUMN), acc, SPLIT)
    acc = _multiply(w_z, buffers[1].permute((1, 0)).load(COLUMN), acc, SPLIT)
    acc = _multiply(w_n, buffers[2].permute((1, 0)).load(COLUMN), acc, SPLIT)
    dh += _to_units(acc, HP, N, SPLIT) * unscale
    return dh, saved


@gluon.jit(do_not_specialize=SIZES)
def gru_backward_resident_kernel(
    dy_ptr,  # (T, B, D, H)
    dh_n_ptr,  # (D, B, H)
    y_ptr,  # (T, B, D, H)
    gates_ptr,  # (T, B, D, H, 4), r, z, n, q
    h0_ptr,  # (D, B, H)
    w_hh_ptr,  # (D, 3H, H)
    dgi_ptr,  # (T, B, D, 3H)
    dq_ptr,  # (T, B, D, H)
    dh0_ptr,  # (D, B, H)
    T,
    B,
    H: gl.constexpr,
    HP: gl.constexpr,  # H padded to a power of two; a warp for every 16
    N: gl.constexpr,
    SPLIT: gl.constexpr,
):
    SCALED: gl.constexpr = y_ptr.dtype.element_ty == gl.float32
    OPERAND: gl.constexpr = gl.float16 if SCALED else y_ptr.dtype.element_ty
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    b0 = gl.program_id(0) * N
    d = gl.program_id(1)
    # Transposed: element (i, k) of the operand is w_hh[gate, k, i].
    w = w_hh_ptr + d * (3 * H * H)
    w_r, w_z, w_n, w_scale = _load_operands(w, 1, H, H, HP)
    w_unscale = 1.0
    if SCALED:
        w_unscale = _inverse(w_scale)
    j, b = _indices(B, b0, H, _units(HP, N, SPLIT), 1)
    jg, bg = _indices(B, b0, H, _quads(HP, N, SPLIT), 4)
    offs_gates = bg * (8 * H) + jg
    dh = gl.load(dh_n_ptr + (d.to(gl.int64) * B + b0) * H + (b * H + j)).to(gl.float32)
    # One allocation for each gate and turn, so it is plain that a step's accesses never meet the next one's.
    even = (
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
    )
    odd = (
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
        gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP)),
    )

    sources, targets, weights = (dy_ptr, y_ptr, gates_ptr, h0_ptr), (dgi_ptr, dq_ptr), (w_r, w_z, w_n)
    place, indices = (B, b0, d), (j, b, offs_gates)
    t = (1 - d) * (T - 1)
    step = 2 * d - 1
    saved = _load_saved(sources, t, step, T, place, indices, H)
    if T % 2 == 1:
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        dh, saved = _backward_step(
            sources, targets, odd, dh, saved, weights, w_unscale, t, t_next, step, T, place, indices,
            H, HP, N, SPLIT, OPERAND, SCALED,
        )  # fmt: skip
        t += step
    for _ in range(T // 2):
        dh, saved = _backward_step(
            sources, targets, even, dh, saved, weights, w_unscale, t, t + step, step, T, place, indices,
            H, HP, N, SPLIT, OPERAND, SCALED,
        )  # fmt: skip
        t += step
        # There is nothing before the first step, so it asks for its own operands once more.
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        dh, saved = _backward_step(
            sources, targets, odd, dh, saved, weights, w_unscale, t, t_next, step, T, place, indices,
            H, HP, N, SPLIT, OPERAND, SCALED,
        )  # fmt: skip
        t += step
    d = gl.where(t < 0, 0, 1)
    _store_state(dh0_ptr, dh, b * (2 * H) + j, B, b0, d, H)


@dataclass(frozen=True)
class ResidentKernel(Kernel):
    """Serves H up to 128, on a GPU."""

    name = "resident"
    widths = (16, 32, 64, 100, 128)
    steps_a_turn = 2
    proven: tuple[Proven, ...] = proven_for("resident")

    def refusal(self, call: Call) -> str | None:
        if call.varlen:
            return "the input is a PackedSequence"
        if reason := gpu_refusal(call):
            return reason
        if call.hidden > ONE_PROCESSOR:
            return f"hidden_size is {call.hidden}, and W_hh fits the registers up to {ONE_PROCESSOR}"
        return None

    def choose(self, call: Call, batch: int) -> ResidentConfig:
        return choose_resident(call, batch)

    def gates_shape(self, rows: tuple[int, ...], hidden: int) -> tuple[int, ...]:
        return (*rows, hidden, 4)

    def forward(
        self, gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, y: Tensor, h_n: Tensor, gates: Tensor,
        call: Call, varlen: Varlen | None, config: ResidentConfig | None = None,
    ) -> None:  # fmt: skip
        steps, batch, directions, hidden = y.shape
        c = config or self.choose(call, batch)
        gru_forward_resident_kernel[-(-batch // c.rows), directions](
            gi, w_hh, gi if b_hn is None else b_hn, h0, y, h_n, gates, steps, batch,
            H=hidden, HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0, **c.constants(), **c.options(),
        )  # fmt: skip

    def backward(
        self, dy: Tensor, dh_n: Tensor, y: Tensor, gates: Tensor, h0: Tensor, w_hh: Tensor, dgi: Tensor, dq: Tensor,
        dh0: Tensor, h_prev: Tensor | None, call: Call, varlen: Varlen | None, config: ResidentConfig | None = None,
    ) -> None:  # fmt: skip
        steps, batch, directions, hidden = y.shape
        c = config or self.choose(call, batch)
        gru_backward_resident_kernel[-(-batch // c.rows), directions](
            dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, steps, batch, H=hidden, **c.constants(), **c.options()
        )

    def functions(self, config: ResidentConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        return {"forward": (gru_forward_resident_kernel, {}), "backward": (gru_backward_resident_kernel, {})}


KERNEL = ResidentKernel()
