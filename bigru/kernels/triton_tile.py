"""The order in which the persistent kernels of "triton" hold the state, and W_hh in the order that goes with it."""

from __future__ import annotations

import triton
import triton.language as tl

from bigru.kernels.cell import TRITON_VERSION, _load_weights

FLAT = tl.constexpr(TRITON_VERSION > (3, 6))
"""True if the tile has two axes.

Of axes that are not contiguous in memory, threads go along the first under triton 3.6, along the last under newer ones.
Two axes would do for both, but with them 3.6 spills 8 bytes in one kernel.
"""


@triton.jit
def _tile(HP: tl.constexpr, N: tl.constexpr):
    """Returns hidden units and batch rows of a tile (4, 8, HP / 16, 2, N / 8, 2) or, if FLAT, (HP * N / 2, 2).

    In its order the threads of an NVIDIA GPU hold an MMA's result: thread 4g + c of warp w has rows g and g + 8 of the
    warp's 16 and columns 2c and 2c + 1 of each eight. The weights are in such an order that these rows are units 2g and
    2g + 1, neighbours in memory and in the tile. The other axes are c, g, w, the two columns and the eights of columns;
    down a flat tile c goes fastest, then g, w, the eights and the two. Triton gives what is loaded in this shape to the
    same threads, so that neither loads nor stores take a way through shared memory and its barriers, of which (HP, N)
    takes two each.
    """
    if FLAT:
        place = tl.arange(0, HP * N // 2)[:, None]
        columns = place % 4 * 2 + place // (2 * HP) % (N // 8) * 8 + place // (HP * N // 4)
        units = place // 4 % (HP // 2) * 2 + tl.arange(0, 2)[None, :]
    else:
        columns = tl.arange(0, 4)[:, None, None, None, None, None] * 2
        columns += tl.arange(0, 2)[None, None, None, :, None, None]
        columns += tl.arange(0, N // 8)[None, None, None, None, :, None] * 8
        units = tl.arange(0, 8)[None, :, None, None, None, None] * 2 + tl.arange(0, 2)[None, None, None, None, None, :]
        units += tl.arange(0, HP // 16)[None, None, :, None, None, None] * 16
    return units, columns


@triton.jit
def _to_tile(x, HP: tl.constexpr, N: tl.constexpr):
    """A product (HP, N) as a tile."""
    x = x.reshape([HP // 16, 2, 8, N // 8, 4, 2])
    return x.permute([5, 3, 0, 2, 4, 1]).reshape([HP * N // 2, 2]) if FLAT else x.permute([4, 2, 0, 5, 3, 1])


@triton.jit
def _from_tile(x, HP: tl.constexpr, N: tl.constexpr):
    """A tile as (HP, N), by unit and batch row."""
    if FLAT:
        return x.reshape([2, N // 8, HP // 16, 8, 4, 2]).permute([2, 3, 5, 1, 4, 0]).reshape([HP, N])
    else:
        return x.permute([2, 1, 5, 4, 0, 3]).reshape([HP, N])


@triton.jit
def _in_order(x, HP: tl.constexpr, BATCHED: tl.constexpr):
    """Weights with rows in the order that `_to_tile` undoes."""
    x = x.reshape([HP // 16, 8, 2, HP]).permute([0, 2, 1, 3])
    return x.reshape([HP // 16, 16, HP] if BATCHED else [HP, HP])


@triton.jit
def _load_ordered(w, mask, HP: tl.constexpr, SPLIT: tl.constexpr, BATCHED: tl.constexpr):
    """One gate's weights."""
    high, low, peak = _load_weights(w, mask, SPLIT)
    high = _in_order(high, HP, BATCHED)
    if SPLIT:
        low = _in_order(low, HP, BATCHED)
    return high, low, peak


@triton.jit
def _load_gates_weights(w, mask, H: tl.constexpr, HP: tl.constexpr, SPLIT: tl.constexpr, BATCHED: tl.constexpr):
    w_r = _load_ordered(w, mask, HP, SPLIT, BATCHED)
    w_z = _load_ordered(w + H * H, mask, HP, SPLIT, BATCHED)
    return w_r, w_z, _load_ordered(w + 2 * H * H, mask, HP, SPLIT, BATCHED)
