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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from bigru.kernels.portable import SIZES

barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def _accumulator(HP):
    """Layout of gates^T: a warp's 16 hidden units by 8 columns, repeated along the columns."""
    return gl.NVMMADistributedLayout([2, 0], [HP // 16, 1], [16, 8])


@gluon.constexpr_function
def _units(HP, N, SPLIT):
    """Layout of (HP hidden units, N batch rows): the accumulator's, where a thread's rows g and g + 8 are named units
    2g and 2g + 1, so that they are neighbours in memory; with SPLIT its columns 2b and 2b + 1 are one batch row."""
    registers = [[1, 0]] if SPLIT else [[1, 0], [0, 1]]
    lanes = [[0, 1], [0, 2]] if SPLIT else [[0, 2], [0, 4]]
    tile = 4 if SPLIT else 8
    registers += [[0, tile << i] for i in range((N // tile).bit_length() - 1)]
    lanes += [[2, 0], [4, 0], [8, 0]]
    warps = [[16 << i, 0] for i in range((HP // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [HP, N])


@gluon.constexpr_function
def _quads(HP, N, SPLIT):
    """Layout of (4 HP, N), four numbers for each hidden unit, all with the thread that holds the unit."""
    units = _units(HP, N, SPLIT)

    def of(bases):
        return [[4 * unit, row] for unit, row in bases]

    registers = [[1, 0], [2, 0], *of(units.reg_bases)]
    return gl.DistributedLinearLayout(registers, of(units.lane_bases), of(units.warp_bases), [], [4 * HP, N])


@gluon.constexpr_function
def _buffer(HP):
    """Shared memory of (columns, HP) 16-bit numbers, in the order that ldmatrix reads without bank conflicts."""
    return gl.SwizzledSharedLayout(8, 1, min(8, HP // 8), [1, 0])


@gluon.jit
def _sigmoid(x, FAST: gl.constexpr):
    if FAST:
        y = 0.5 * _tanh_approx(0.5 * x) + 0.5
    else:
        # As 1 / (1 + exp(-x)), without the care for denormal numbers that neither 1 + e nor its inverse needs.
        e = gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
        )
        y = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=gl.float32, is_pure=True, pack=1
        )
    return y


@gluon.jit
def _tanh_approx(x):
    # At most 2^-11 from the truth, relative (PTX ISA, tanh).
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _tanh(x, FAST: gl.constexpr):
    if FAST:
        y = _tanh_approx(x)
    else:
        # 2 sigmoid(2x) - 1 never divides infinities; near zero it cancels, so the series serves there.
        s = x * x
        near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
        y = gl.where(s < 0.09, near, 2.0 * _sigmoid(2.0 * x, FAST) - 1.0)
    return y


@gluon.jit
def _indices(B, b0, H: gl.constexpr, LAYOUT: gl.constexpr, EACH: gl.constexpr):
    """Offsets of a layout's units (EACH numbers a unit) and batch rows, those past the end being the last one."""
    i = gl.arange(0, LAYOUT.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    b = gl.arange(0, LAYOUT.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    if LAYOUT.shape[0] > EACH * H:
        i = gl.minimum(i // EACH, H - 1) * EACH + i % EACH
    return i[:, None], gl.minimum(b, B - 1 - b0)[None, :]


@gluon.jit
def _scale_of(peak):
    """The power of two that brings a positive number into [1024, 2048)."""
    exponent = gl.maximum(peak, 1e-30).to(gl.int32, bitcast=True) >> 23
    return ((264 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _inverse(scale):
    """1 / scale, for a power of two."""
    return (0x7F000000 - scale.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.jit
def _load_operands(w, unit_stride, k_stride, H: gl.constexpr, HP: gl.constexpr):
    """The recurrent weights of r, z and n as A operands, high and low part of each, and their common scale.

    fp32 is scaled and split; 16-bit weights are taken as they are."""
    scale = 1.0
    if w.dtype.element_ty == gl.float32:
        # What one scale loses of a gate far below the others, the sums of products would not show.
        peak = gl.maximum(_peak(w, H, HP), gl.maximum(_peak(w + H * H, H, HP), _peak(w + 2 * H * H, H, HP)))
        scale = _scale_of(peak)
    r = _load_operand(w, unit_stride, k_stride, scale, H, HP)
    z = _load_operand(w + H * H, unit_stride, k_stride, scale, H, HP)
    n = _load_operand(w + 2 * H * H, unit_stride, k_stride, scale, H, HP)
    return r, z, n, scale


@gluon.jit
def _peak(w, H: gl.constexpr, HP: gl.constexpr):
    """Largest magnitude of (H, H) numbers."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [HP // 16, 1], [1, 0])
    i = gl.arange(0, HP, layout=gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, HP, layout=gl.SliceLayout(0, LAYOUT))
    if H < HP:
        i = gl.minimum(i, H - 1)
        k = gl.minimum(k, H - 1)
    return gl.max(gl.max(gl.abs(gl.load(w + i[:, None] * H + k[None, :])), 1), 0)


@gluon.jit
def _load_operand(w, unit_stride, k_stride, scale, H: gl.constexpr, HP: gl.constexpr):
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _accumulator(HP), 2)
    p = gl.arange(0, HP, layout=gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, HP, layout=gl.SliceLayout(0, LAYOUT))
    # Row p of a warp's 16 is the unit that `_units` names so.
    unit = gl.minimum((p & ~15) | ((p & 7) << 1) | ((p >> 3) & 1), H - 1)
    high = gl.load(w + unit[:, None] * unit_stride + gl.minimum(k, H - 1)[None, :] * k_stride)
    if H < HP:
        high = gl.where((k < H)[None, :], high, 0.0)
    low = high
    if high.dtype == gl.float32:
        high, low = _halves(high * scale)
        # What comes next is not to be loaded while these weights, not yet packed, fill the registers.
        barrier()
    return high, low


@gluon.jit
def _halves(x):
    """Two fp16 numbers, high and low, whose sum is x to 22 bits."""
    # In pairs, as the MMA takes them: left to the compiler, numbers are packed only at their use, and spill till then.
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 a, b;
        .reg .f32 c, d;
        cvt.rn.f16x2.f32 $0, $3, $2;
        mov.b32 {a, b}, $0;
        cvt.f32.f16 c, a;
        cvt.f32.f16 d, b;
        sub.f32 c, $2, c;
        sub.f32 d, $3, d;
        cvt.rn.f16x2.f32 $1, d, c;
        }
        """,
        "=&r,=r,f,f", [x], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _put(buffer, x, OPERAND: gl.constexpr, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Stores (HP, N) numbers where the next product reads them."""
    high = x.to(OPERAND)
    if SPLIT:
        low = (x - high.to(gl.float32)).to(OPERAND)
        high = gl.join(high, low).reshape([HP, 2 * N])
    buffer.permute((1, 0)).store(high)


@gluon.jit
def _multiply(weights, x, acc, SPLIT: gl.constexpr):
    if SPLIT:
        acc = mma_v2(weights[1], x, acc)
    return mma_v2(weights[0], x, acc)


@gluon.jit
def _to_units(acc, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """An accumulator's numbers by unit and batch row; nothing moves between threads."""
    if SPLIT:
        of_high, of_low = gl.split(acc.reshape([HP, N, 2]))
        acc = of_high + of_low
    acc = acc.reshape([HP // 16, 2, 8, N]).permute([0, 2, 1, 3]).reshape([HP, N])
    return gl.convert_layout(acc, _units(HP, N, SPLIT))


@gluon.jit
def _row(t, place):
    """Index of a program's first row in (T, B, D), 64-bit."""
    B, b0, d = place
    return (t.to(gl.int64) * B + b0) * 2 + d


@gluon.jit
def _store_state(state_ptr, state, offs_y, B, b0, d, H: gl.constexpr):
    """Stores to (D, B, H) after the time loop."""
    # The compiler would find this address before the loop and keep it in registers that the loop needs. It cannot see
    # through the instruction, nor (at the call) that the direction follows from the last t.
    offs = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [offs_y], dtype=gl.int32, is_pure=False, pack=1)
    offs = offs // (2 * H) * H + offs % (2 * H)
    gl.store(state_ptr + (d.to(gl.int64) * B + b0) * H + offs, state.to(state_ptr.dtype.element_ty))


@gluon.jit
def _load_gates_in(gi_ptr, row, offs, H: gl.constexpr):
    gi = gi_ptr + row * (3 * H) + offs
    return gl.load(gi), gl.load(gi + H), gl.load(gi + 2 * H)


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
    t_before = t + step
    inside = (t_before >= 0) & (t_before < T)
    before = y_ptr + _row(t_before, place) * H
    before = before if inside else h0_ptr + (d.to(gl.int64) * B + b0) * H
    h_before = gl.load(before + (b * (2 * H if inside else H) + j))
    return dy, quads, h_before


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
