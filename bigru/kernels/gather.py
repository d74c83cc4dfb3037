"""Gathers what a layer's kernels read, in one launch: weights in one piece, the input in time's order, zeros for h0."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bigru.kernels.launch import Launcher

BLOCK = 1024
"""Numbers that one program writes."""
POINTERS = ("w_ih_0", "w_hh_0", "b_ih_0", "b_hh_0", "w_ih_1", "w_hh_1", "b_ih_1", "b_hh_1", "x_ptr", "out_ptr")
SIZES = ("first_x", "total", "B", "stride_t", "stride_b", "stride_i")


@triton.jit
def _piece(ptr, i, n):
    """Returns n numbers from a pointer on, where 0 <= i < n, and zeros elsewhere."""
    return tl.load(ptr + i, (i >= 0) & (i < n), 0.0).to(tl.float32)


# Nothing here is read in vectors, and the weights may lie at any address.
@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def gather_kernel(
    w_ih_0, w_hh_0, b_ih_0, b_hh_0, w_ih_1, w_hh_1, b_ih_1, b_hh_1, x_ptr, out_ptr, first_x: tl.int64, total: tl.int64,
    B, stride_t: tl.int64, stride_b: tl.int64, stride_i: tl.int64, H: tl.constexpr, INPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, W_IH: tl.constexpr, BIAS: tl.constexpr, B_HN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    if first < first_x:
        # Each number lies in one of these, or in none: those are zeros, h0's among them.
        value = _piece(w_hh_0, o, 3 * H * H) + _piece(w_hh_1, o - 3 * H * H, 3 * H * H)
        value += _piece(w_ih_0, o - W_IH, 3 * H * INPUTS) + _piece(w_ih_1, o - W_IH - 3 * H * INPUTS, 3 * H * INPUTS)
        if HAS_BIAS:
            # Of b_hh, r and z go with b_ih; n stays apart, since r multiplies it.
            value += _piece(b_ih_0, o - BIAS, 3 * H) + _piece(b_hh_0, o - BIAS, 2 * H)
            value += _piece(b_ih_1, o - BIAS - 3 * H, 3 * H) + _piece(b_hh_1, o - BIAS - 3 * H, 2 * H)
            value += _piece(b_hh_0 + 2 * H, o - B_HN, H) + _piece(b_hh_1 + 2 * H, o - B_HN - H, H)
        tl.store(out_ptr + o, value, o < first_x)
    else:
        row = (o - first_x) // INPUTS
        t = row // B
        x = x_ptr + t * stride_t + (row - t * B) * stride_b + ((o - first_x) - row * INPUTS) * stride_i
        tl.store(out_ptr + o, tl.load(x, o < total, 0.0), o < total)


LAUNCHER = Launcher(gather_kernel, alignment=1)


class Layout(NamedTuple):
    """Where what is gathered begins, and what else `gather_kernel` is compiled for; its configuration."""

    hidden: int
    inputs: int
    biased: bool
    starts: tuple[int, ...]
    """Of w_ih, b_ih + b_hh, b_hn, h0 and x, behind w_hh; each where a GPU reads fastest."""
    dtypes: tuple[torch.dtype, ...]

    def constants(self) -> dict[str, Any]:
        """Returns the kernel's compile-time arguments."""
        names = ("H", "INPUTS", "HAS_BIAS", "W_IH", "BIAS", "B_HN", "BLOCK")
        return dict(zip(names, (*self[:3], *self.starts[:3], BLOCK), strict=True))

    def options(self) -> dict[str, Any]:
        """Returns the compiler's options."""
        return {"num_warps": 4, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=1024)
def lay_out(hidden: int, inputs: int, biased: bool, rows: int, dtypes: tuple[torch.dtype, ...]) -> Layout:
    """Returns the layout for so many rows of zeros for h0."""
    sizes = 6 * hidden * hidden, 6 * hidden * inputs, 6 * hidden * biased, 2 * hidden * biased, 2 * hidden * rows
    *starts, end = itertools.accumulate(-(-size // 64) * 64 for size in sizes)
    return Layout(hidden, inputs, biased, (*starts, -(-end // BLOCK) * BLOCK), dtypes)
