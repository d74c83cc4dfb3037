"""The forward kernel of `bigru.kernels.resident`, which says where the numbers lie, and why."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigru.kernels.cell import SIZES
from bigru.kernels.resident_tiles import (
    _accumulator,
    _buffer,
    _indices,
    _inverse,
    _keep,
    _load_chunks,
    _load_gates_in,
    _load_operands,
    _multiply_all,
    _present,
    _put,
    _quads,
    _quads_present,
    _row,
    _scale_of,
    _sigmoid,
    _store_state,
    _tanh,
    _to_quads,
    _to_units,
    _units,
)


@gluon.constexpr_function
def _roomy(dtype, HP):
    """Whether a step has registers for what it computes early: fp32's W_hh leaves none at H=128, and below 64 units
    ptxas stops at 80."""
    return dtype != gl.float32 and HP >= 64


@gluon.constexpr_function
def _depth(dtype, HP, SAVE):
    """Columns of W_hh in one product: 16, the depth of one MMA, or 32, which one ldmatrix reads of 8 batch rows."""
    # With 32 and no gates saved, ptxas stops at 100 registers at H=64, and has loads wait for one another.
    return 32 if _roomy(dtype, HP) and (SAVE or HP == 128) else 16


@gluon.jit
def _forward_step(
    fixed, lengths, read, write, h, gates_in, t, t_next, H: gl.constexpr, HP: gl.constexpr, N: gl.constexpr,
    SAVE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One step: the state comes from one buffer and goes to the other; returns it and the next step's input gates."""
    pointers, weights, b_hn, scales, place, offs = fixed
    gi_ptr, y_ptr, gates_ptr = pointers
    w_r, w_z, w_n = weights
    scale, unscale = scales
    offs_gi, offs_y, offs_gates = offs
    UNITS: gl.constexpr = _units(HP, N, SPLIT)
    ROOMY: gl.constexpr = _roomy(gi_ptr.dtype.element_ty, HP)
    DEPTH: gl.constexpr = _depth(gi_ptr.dtype.element_ty, HP, SAVE)
    row_next = _row(t_next, place)
    present = _present(t, lengths, UNITS)
    x = _load_chunks(read, HP, DEPTH)
    zero = gl.zeros([HP, 2 * N if SPLIT else N], gl.float32, _accumulator(HP))
    h_r = _to_units(_multiply_all(w_r, x, zero, HP // DEPTH, SPLIT), HP, N, SPLIT) * unscale
    h_z = _to_units(_multiply_all(w_z, x, zero, HP // DEPTH, SPLIT), HP, N, SPLIT) * unscale
    q = _to_units(_multiply_all(w_n, x, zero, HP // DEPTH, SPLIT), HP, N, SPLIT) * unscale + b_hn
    r = _sigmoid(gates_in[0].to(gl.float32) + h_r, not SPLIT)
    z = _sigmoid(gates_in[1].to(gl.float32) + h_z, not SPLIT)
    if ROOMY:
        # n is known last, so only one operation on it is left to wait for.
        rest, kept = 1.0 - z, z * h
    n = _tanh(gates_in[2].to(gl.float32) + r * q, not SPLIT)
    # Asked for now, into the registers of this step's; the next step's products hide the latency.
    gates_in = _load_gates_in(gi_ptr, row_next, offs_gi, _present(t_next, lengths, UNITS), H)
    h = _keep(present, n * rest + kept if ROOMY else n + z * (h - n), h)
    _put(write, h * scale, HP, N, SPLIT)
    row = _row(t, place)
    gl.store(y_ptr + row * H + offs_y, h.to(y_ptr.dtype.element_ty), present)
    if SAVE:
        quads = _to_quads(r, z, n, q, HP, N, SPLIT).to(gates_ptr.dtype.element_ty)
        gl.store(gates_ptr + row * (4 * H) + offs_gates, quads, _quads_present(present, HP, N, SPLIT))
    return h, gates_in


@gluon.jit(do_not_specialize=SIZES)
def gru_forward_resident_kernel(
    gi_ptr, w_hh_ptr, b_hn_ptr, h0_ptr, y_ptr, h_n_ptr, gates_ptr, varlen_ptr, T, B, H: gl.constexpr, HP: gl.constexpr,
    N: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    UNITS: gl.constexpr = _units(HP, N, SPLIT)
    QUADS: gl.constexpr = _quads(HP, N, SPLIT)
    SCALED: gl.constexpr = gi_ptr.dtype.element_ty == gl.float32
    OPERAND: gl.constexpr = gl.float16 if SCALED else gi_ptr.dtype.element_ty
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    b0 = gl.program_id(0) * N
    d = gl.program_id(1)
    w = w_hh_ptr + d * (3 * H * H)
    w_r, w_z, w_n, w_scale = _load_operands(w, H, 1, H, HP, _depth(gi_ptr.dtype.element_ty, HP, SAVE))
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

    lengths = None
    if varlen_ptr is not None:
        # As many steps as the longest of the program's sequences has, which is the first.
        T = gl.load(varlen_ptr + b0).to(gl.int32)
        lengths = gl.load(varlen_ptr + b0 + b).to(gl.int32)
    t = d * (T - 1)
    step = 1 - 2 * d
    pointers, place, offs = (gi_ptr, y_ptr, gates_ptr), (varlen_ptr, B, b0, d), (offs_gi, offs_y, offs_gates)
    fixed = (pointers, (w_r, w_z, w_n), b_hn, (scale, unscale), place, offs)
    gates_in = _load_gates_in(gi_ptr, _row(t, place), offs_gi, _present(t, lengths, UNITS), H)
    if T % 2 == 1:
        _put(odd, h * scale, HP, N, SPLIT)
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        h, gates_in = _forward_step(fixed, lengths, odd, even, h, gates_in, t, t_next, H, HP, N, SAVE, SPLIT)
        t += step
    else:
        _put(even, h * scale, HP, N, SPLIT)
    for _ in range(T // 2):
        h, gates_in = _forward_step(fixed, lengths, even, odd, h, gates_in, t, t + step, H, HP, N, SAVE, SPLIT)
        t += step
        # There is nothing after the last step, so it asks for its own input gates once more.
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        h, gates_in = _forward_step(fixed, lengths, odd, even, h, gates_in, t, t_next, H, HP, N, SAVE, SPLIT)
        t += step
    d = gl.where(t < 0, 1, 0)
    _store_state(h_n_ptr, h, offs_y, B, b0, d, H)
