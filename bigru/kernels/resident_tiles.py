"""The Gluon functions of the resident kernels: where a tile lies, its arithmetic, its loads and its stores.

`bigru.kernels.resident` says how the numbers are laid out, and why.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

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
def _all_warps(HP, N, SPLIT):
    """Layout of (HP / 16, N), a number for each warp and row: a thread has all warps' for its rows in `_units`."""
    warps = (HP // 16).bit_length() - 1
    tile = 4 if SPLIT else 8
    registers = [[1 << i, 0] for i in range(warps)] + ([] if SPLIT else [[0, 1]])
    registers += [[0, tile << i] for i in range((N // tile).bit_length() - 1)]
    lanes = ([[0, 1], [0, 2]] if SPLIT else [[0, 2], [0, 4]]) + [[0, 0]] * 3
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * warps, [], [HP // 16, N])


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
def _load_operands(w, unit_stride, k_stride, H: gl.constexpr, HP: gl.constexpr, DEPTH: gl.constexpr = 16):
    """The recurrent weights of r, z and n as A operands, high and low part of each, and their common scale.

    fp32 is scaled and split; 16-bit weights are taken as they are."""
    scale = 1.0
    if w.dtype.element_ty == gl.float32:
        # What one scale loses of a gate far below the others, the sums of products would not show.
        peak = gl.maximum(_peak(w, H, HP), gl.maximum(_peak(w + H * H, H, HP), _peak(w + 2 * H * H, H, HP)))
        scale = _scale_of(peak)
    r = _load_operand(w, unit_stride, k_stride, scale, H, HP, DEPTH)
    z = _load_operand(w + H * H, unit_stride, k_stride, scale, H, HP, DEPTH)
    n = _load_operand(w + 2 * H * H, unit_stride, k_stride, scale, H, HP, DEPTH)
    return r, z, n, scale


@gluon.jit
def _peak(w, H: gl.constexpr, HP: gl.constexpr):
    """Largest magnitude of (H, H) numbers, infinities aside: one spoils its own unit, not the scale of all."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [HP // 16, 1], [1, 0])
    i = gl.arange(0, HP, layout=gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, HP, layout=gl.SliceLayout(0, LAYOUT))
    if H < HP:
        i = gl.minimum(i, H - 1)
        k = gl.minimum(k, H - 1)
    x = gl.abs(gl.load(w + i[:, None] * H + k[None, :]))
    return gl.max(gl.max(gl.where(x < float("inf"), x, 0.0), 1), 0)


@gluon.jit
def _load_operand(w, unit_stride, k_stride, scale, H: gl.constexpr, HP: gl.constexpr, DEPTH: gl.constexpr):
    """High and low parts of one gate's weights, each in chunks of DEPTH columns; one MMA takes 16."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, _accumulator(HP), 2)
    p = gl.arange(0, HP, layout=gl.SliceLayout(1, LAYOUT))
    # Row p of a warp's 16 is the unit that `_units` names so.
    unit = gl.minimum((p & ~15) | ((p & 7) << 1) | ((p >> 3) & 1), H - 1)
    highs = ()
    lows = ()
    for c in gl.static_range(HP // DEPTH):
        k = c * DEPTH + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, LAYOUT))
        high = gl.load(w + unit[:, None] * unit_stride + gl.minimum(k, H - 1)[None, :] * k_stride)
        if H < HP:
            high = gl.where((k < H)[None, :], high, 0.0)
        low = high
        if w.dtype.element_ty == gl.float32:
            high, low = _halves(high * scale)
            if (c + 1) * DEPTH % 64 == 0:
                # What comes next is not to be loaded while these weights, not yet packed, fill the registers.
                barrier()
        highs += (high,)
        lows += (low,)
    return highs, lows


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
def _put(buffer, x, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Stores (HP, N) numbers where the next product reads them."""
    high = x.to(buffer.dtype)
    if SPLIT:
        low = (x - high.to(gl.float32)).to(buffer.dtype)
        high = gl.join(high, low).reshape([HP, 2 * N])
    buffer.permute((1, 0)).store(high)


@gluon.jit
def _multiply(weights, c: gl.constexpr, x, acc, SPLIT: gl.constexpr):
    """Adds the product of chunk c of a gate's weights and x, the same chunk of the other factor."""
    if SPLIT:
        acc = mma_v2(weights[1][c], x, acc)
    return mma_v2(weights[0][c], x, acc)


@gluon.jit
def _load_chunk(buffer, c: gl.constexpr, HP: gl.constexpr, DEPTH: gl.constexpr = 16):
    """Chunk c of what `_put` stored, as B operand."""
    return buffer.slice(c * DEPTH, DEPTH, 1).permute((1, 0)).load(gl.DotOperandLayout(1, _accumulator(HP), 2))


@gluon.jit
def _load_chunks(buffer, HP: gl.constexpr, DEPTH: gl.constexpr):
    chunks = ()
    for c in gl.static_range(HP // DEPTH):
        chunks += (_load_chunk(buffer, c, HP, DEPTH),)
    return chunks


@gluon.jit
def _multiply_all(weights, chunks, acc, CHUNKS: gl.constexpr, SPLIT: gl.constexpr):
    """Adds the product of a gate's weights and all chunks of the other factor."""
    if SPLIT:
        for c in gl.static_range(CHUNKS):
            acc = mma_v2(weights[1][c], chunks[c], acc)
    for c in gl.static_range(CHUNKS):
        acc = mma_v2(weights[0][c], chunks[c], acc)
    return acc


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
    """Index of a program's first row at step t in (T, B, D) or (P, D), 64-bit."""
    varlen_ptr, B, b0, d = place
    first = t.to(gl.int64) * B if varlen_ptr is None else gl.load(varlen_ptr + B + t)
    return (first + b0) * 2 + d


@gluon.jit
def _present(t, lengths, LAYOUT: gl.constexpr):
    """Whether there is a row at step t, by unit and batch row; None if all rows are there at all steps."""
    present = None
    if lengths is not None:
        present = (t < lengths).broadcast_to(LAYOUT.shape)
    return present


@gluon.jit
def _load(pointers, present):
    if present is None:
        return gl.load(pointers)
    else:
        return gl.load(pointers, present, 0.0)


@gluon.jit
def _keep(present, new, old):
    """New values of the rows that are there, old ones of the others."""
    if present is None:
        return new
    else:
        return gl.where(present, new, old)


@gluon.jit
def _to_quads(r, z, n, q, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """Four numbers of each unit as (4 HP, N), r, z, n, q side by side; nothing moves between threads."""
    quads = gl.join(gl.join(r, n), gl.join(z, q)).permute([0, 2, 3, 1]).reshape([4 * HP, N])
    return gl.convert_layout(quads, _quads(HP, N, SPLIT))


@gluon.jit
def _quads_present(present, HP: gl.constexpr, N: gl.constexpr, SPLIT: gl.constexpr):
    """`_present` for the numbers of `_to_quads`."""
    quads = None
    if present is not None:
        quads = _to_quads(present, present, present, present, HP, N, SPLIT)
    return quads


@gluon.jit
def _store_state(state_ptr, state, offs_y, B, b0, d, H: gl.constexpr):
    """Stores to (D, B, H) after the time loop."""
    # The compiler would find this address before the loop and keep it in registers that the loop needs. It cannot see
    # through the instruction, nor (at the call) that the direction follows from the last t.
    offs = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [offs_y], dtype=gl.int32, is_pure=False, pack=1)
    offs = offs // (2 * H) * H + offs % (2 * H)
    gl.store(state_ptr + (d.to(gl.int64) * B + b0) * H + offs, state.to(state_ptr.dtype.element_ty))


@gluon.jit
def _load_gates_in(gi_ptr, row, offs, present, H: gl.constexpr):
    gi = gi_ptr + row * (3 * H) + offs
    return _load(gi, present), _load(gi + H, present), _load(gi + 2 * H, present)
