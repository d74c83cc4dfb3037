"""The backward kernel of `bigru.kernels.resident`, which says where the numbers lie, and why."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bigru.kernels.cell import SIZES
from bigru.kernels.resident_tiles import (
    _accumulator,
    _all_warps,
    _buffer,
    _indices,
    _inverse,
    _keep,
    _load,
    _load_chunk,
    _load_operands,
    _multiply,
    _present,
    _put,
    _quads,
    _quads_present,
    _row,
    _scale_of,
    _store_state,
    _to_units,
    _units,
)


@gluon.jit
def _load_saved(
    sources, t, step, T, place, lengths, indices, H: gl.constexpr, HP: gl.constexpr, N: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """What a backward step at t reads: dy, the four gates, and the state before it, which is h0 at the first t."""
    dy_ptr, y_ptr, gates_ptr, h0_ptr = sources
    j, b, offs_gates = indices
    varlen_ptr, B, b0, d = place
    row = _row(t, place)
    present = _present(t, lengths, _units(HP, N, SPLIT))
    dy = _load(dy_ptr + row * H + (b * (2 * H) + j), present)
    quads = _load(gates_ptr + row * (4 * H) + offs_gates, _quads_present(present, HP, N, SPLIT))
    t_before = t + step
    first = h0_ptr + (d.to(gl.int64) * B + b0) * H
    if varlen_ptr is None:
        inside = (t_before >= 0) & (t_before < T)
        before = y_ptr + _row(t_before, place) * H if inside else first
        before += b * (2 * H if inside else H) + j
    else:
        # Direction 1 starts at each sequence's own end.
        row = _row(gl.minimum(gl.maximum(t_before, 0), T - 1), place)
        before = gl.where(t == d * (lengths - 1), first + b * H, y_ptr + row * H + b * (2 * H)) + j
    return dy, quads, _load(before, present)


@gluon.jit
def _of_quads(quads, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """r, z, n, q in fp32 by unit and batch row."""
    UNITS: gl.constexpr = _units(HP, N, SPLIT)
    r_n, z_q = gl.split(quads.to(gl.float32).reshape([HP, 2, 2, N]).permute([0, 3, 1, 2]))
    r, n = gl.split(r_n)
    z, q = gl.split(z_q)
    r, z = gl.convert_layout(r, UNITS), gl.convert_layout(z, UNITS)
    return r, z, gl.convert_layout(n, UNITS), gl.convert_layout(q, UNITS)


@gluon.jit
def _allocate(OPERAND: gl.constexpr, BY_WARP: gl.constexpr, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Shared memory for one step: the gradients of three gates, and a number for each warp and batch row."""
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    r = gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP))
    z = gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP))
    n = gl.allocate_shared_memory(OPERAND, [COLUMNS, HP], _buffer(HP))
    if BY_WARP:
        scales = gl.allocate_shared_memory(gl.float32, [HP // 16 * N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        scales = gl.allocate_shared_memory(gl.float32, [HP // 16, N], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    return r, z, n, scales


@gluon.jit
def _largest(peak, buffer, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """(N,) largest of all warps' numbers (HP / 16, N), at one barrier: every thread reads them all."""
    buffer.store(peak)
    return gl.convert_layout(gl.max(buffer.load(_all_warps(HP, N, SPLIT)), 0), gl.SliceLayout(0, _units(HP, N, SPLIT)))


@gluon.jit
def _spread(scales, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Numbers of each warp and batch row, (HP / 16, N), for all 16 units of the warp; nothing moves between threads."""
    ones = gl.full([HP, N], 1.0, gl.float32, _units(HP, N, SPLIT)).reshape([HP // 16, 16, N])
    return gl.convert_layout((ones * scales.expand_dims(1)).reshape([HP, N]), _units(HP, N, SPLIT))


@gluon.jit
def _product(weights, buffers, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Sum of the three gates' products, by unit and batch row."""
    COLUMNS: gl.constexpr = 2 * N if SPLIT else N
    # An accumulator for each gate: an MMA waits for the last one that added to the same accumulator.
    r = gl.zeros([HP, COLUMNS], gl.float32, _accumulator(HP))
    z = r
    n = r
    for c in gl.static_range(HP // 16):
        x_r, x_z, x_n = _load_chunk(buffers[0], c, HP), _load_chunk(buffers[1], c, HP), _load_chunk(buffers[2], c, HP)
        r = _multiply(weights[0], c, x_r, r, SPLIT)
        z = _multiply(weights[1], c, x_z, z, SPLIT)
        n = _multiply(weights[2], c, x_n, n, SPLIT)
    return _to_units(r + z + n, HP, N, SPLIT)


@gluon.jit
def _product_by_warp(weights, buffers, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """`_product` where every chunk, the 16 units of one warp, has scales of its own, whose inverses are in buffers[3].

    An accumulator for each chunk, and two chunks at a time: an MMA waits for the last one that added to the same
    accumulator."""
    ROWS: gl.constexpr = gl.SliceLayout(0, _units(HP, N, SPLIT))
    zero = gl.zeros([HP, 2 * N if SPLIT else N], gl.float32, _accumulator(HP))
    total = gl.zeros([HP, N], gl.float32, _units(HP, N, SPLIT))
    for c in gl.static_range(0, HP // 16, 2):
        first = zero
        second = zero
        for gate in gl.static_range(3):
            first = _multiply(weights[gate], c, _load_chunk(buffers[gate], c, HP), first, SPLIT)
            if c + 1 < HP // 16:
                second = _multiply(weights[gate], c + 1, _load_chunk(buffers[gate], c + 1, HP), second, SPLIT)
        total += _to_units(first, HP, N, SPLIT) * buffers[3].slice(c * N, N).load(ROWS)[None, :]
        if c + 1 < HP // 16:
            total += _to_units(second, HP, N, SPLIT) * buffers[3].slice((c + 1) * N, N).load(ROWS)[None, :]
    return total


@gluon.jit
def _backward_step(
    fixed, lengths, buffers, dh, saved, t, t_next, H: gl.constexpr, HP: gl.constexpr, N: gl.constexpr,
    SPLIT: gl.constexpr, SCALED: gl.constexpr, BY_WARP: gl.constexpr,
):  # fmt: skip
    """One step back; returns the gradient of the state before it and what the next step reads."""
    sources, targets, weights, w_unscale, step, T, place, indices = fixed
    dgi_ptr, dq_ptr, h_prev_ptr = targets
    j, b, _ = indices
    row = _row(t, place)
    present = _present(t, lengths, _units(HP, N, SPLIT))
    dh += saved[0].to(gl.float32)
    r, z, n, q = _of_quads(saved[1], HP, N, SPLIT)
    # Where there is no row, its gradient passes unchanged.
    z = _keep(present, z, 1.0)
    # Everything that dh multiplies comes first, since dh is what the step before is waited for.
    rest = 1.0 - z
    of_n = rest * (1.0 - n * n)
    of_z = (saved[2].to(gl.float32) - n) * (z * rest)
    of_q = of_n * r
    of_r = of_q * (q * (1.0 - r))
    da_n, da_z, da_r, dq = dh * of_n, dh * of_z, dh * of_r, dh * of_q
    dh *= z
    # Asked for now, into the registers of this step's; the products hide the latency.
    if h_prev_ptr is not None:
        gl.store(h_prev_ptr + row * H + (b * (2 * H) + j), saved[2], present)
    saved = _load_saved(sources, t_next, step, T, place, lengths, indices, H, HP, N, SPLIT)
    scale = 1.0
    unscale = w_unscale
    if SCALED:
        # Gradients have no bound, so each batch row is scaled by its largest one: of all units, or of a warp's 16.
        peak = gl.maximum(gl.maximum(gl.abs(da_r), gl.abs(da_z)), gl.abs(dq))
        peak = gl.max(peak.reshape([HP // 16, 16, N]), 1)
        if BY_WARP:
            scales = _scale_of(peak)
            buffers[3].store(_inverse(scales).reshape([HP // 16 * N]))
            scale = _spread(scales, HP, N, SPLIT)
        else:
            scale = _scale_of(_largest(peak, buffers[3], HP, N, SPLIT))[None, :]
            unscale *= _inverse(scale)
    _put(buffers[0], da_r * scale, HP, N, SPLIT)
    _put(buffers[1], da_z * scale, HP, N, SPLIT)
    _put(buffers[2], dq * scale, HP, N, SPLIT)
    dgi = dgi_ptr + row * (3 * H) + (b * (6 * H) + j)
    gl.store(dgi, da_r.to(dgi_ptr.dtype.element_ty), present)
    gl.store(dgi + H, da_z.to(dgi_ptr.dtype.element_ty), present)
    gl.store(dgi + 2 * H, da_n.to(dgi_ptr.dtype.element_ty), present)
    gl.store(dq_ptr + row * H + (b * (2 * H) + j), dq.to(dq_ptr.dtype.element_ty), present)
    if BY_WARP:
        dh += _product_by_warp(weights, buffers, HP, N, SPLIT) * unscale
    else:
        dh += _product(weights, buffers, HP, N, SPLIT) * unscale
    return dh, saved


@gluon.jit(do_not_specialize=SIZES)
def gru_backward_resident_kernel(
    dy_ptr, dh_n_ptr, y_ptr, gates_ptr, h0_ptr, w_hh_ptr, dgi_ptr, dq_ptr, dh0_ptr, varlen_ptr, h_prev_ptr, T, B,
    H: gl.constexpr, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    SCALED: gl.constexpr = y_ptr.dtype.element_ty == gl.float32
    OPERAND: gl.constexpr = gl.float16 if SCALED else y_ptr.dtype.element_ty
    # By warp is faster except where its sums leave too few registers.
    BY_WARP: gl.constexpr = SCALED and not (SPLIT and HP == 128)
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
    # Allocations for each turn, so it is plain that a step's accesses never meet the next one's.
    even = _allocate(OPERAND, BY_WARP, HP, N, SPLIT)
    odd = _allocate(OPERAND, BY_WARP, HP, N, SPLIT)

    sources, targets = (dy_ptr, y_ptr, gates_ptr, h0_ptr), (dgi_ptr, dq_ptr, h_prev_ptr)
    place, indices = (varlen_ptr, B, b0, d), (j, b, offs_gates)
    lengths = None
    if varlen_ptr is not None:
        # As many steps as the longest of the program's sequences has, which is the first.
        T = gl.load(varlen_ptr + b0).to(gl.int32)
        lengths = gl.load(varlen_ptr + b0 + b).to(gl.int32)
    t = (1 - d) * (T - 1)
    step = 2 * d - 1
    fixed = (sources, targets, (w_r, w_z, w_n), w_unscale, step, T, place, indices)
    saved = _load_saved(sources, t, step, T, place, lengths, indices, H, HP, N, SPLIT)
    if T % 2 == 1:
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        dh, saved = _backward_step(fixed, lengths, odd, dh, saved, t, t_next, H, HP, N, SPLIT, SCALED, BY_WARP)
        t += step
    for _ in range(T // 2):
        dh, saved = _backward_step(fixed, lengths, even, dh, saved, t, t + step, H, HP, N, SPLIT, SCALED, BY_WARP)
        t += step
        # There is nothing before the first step, so it asks for its own operands once more.
        t_next = gl.minimum(gl.maximum(t + step, 0), T - 1)
        dh, saved = _backward_step(fixed, lengths, odd, dh, saved, t, t_next, H, HP, N, SPLIT, SCALED, BY_WARP)
        t += step
    d = gl.where(t < 0, 0, 1)
    _store_state(dh0_ptr, dh, b * (2 * H) + j, B, b0, d, H)
