"""Collects what the gradients of a layer's weights and biases are made of, in one launch after the backward recurrence.

That is the state before each step, which dW_hh = sum dgh h_prev^T takes, and sums of dgi and dq, which are those of the
biases. Each program sums its own rows, and ATen the programs' sums: the same bits from run to run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from bigru.kernels.launch import Launcher

ROWS, COLUMNS = 64, 32
"""One block: 128 bytes of a row of fp32 numbers, and 16 numbers a thread."""
PROGRAMS = 512
"""The most programs for one direction: several for each processor of a large GPU."""


@triton.jit(do_not_specialize=("rows", "span", "batch"))
def collect_kernel(
    dgi_ptr, dq_ptr, y_ptr, h0_ptr, h_prev_ptr, sums_ptr, rows, span, batch, H: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    first, d = tl.program_id(0) * span, tl.program_id(1).to(tl.int64)
    end = tl.minimum(first + span, rows)
    for c0 in range(0, H, COLUMNS):
        c = c0 + tl.arange(0, COLUMNS)[None, :]
        r = tl.zeros([ROWS, COLUMNS], tl.float32)
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        n = tl.zeros([ROWS, COLUMNS], tl.float32)
        q = tl.zeros([ROWS, COLUMNS], tl.float32)
        for row0 in range(first, end, ROWS):
            row = row0 + tl.arange(0, ROWS)[:, None].to(tl.int64)
            mask = (row < end) & (c < H)
            if h_prev_ptr is not None:
                # Direction 0 has it a step earlier, direction 1 later; a sequence's first step has the initial state.
                before = row + (2 * d - 1) * batch
                within = (before >= 0) & (before < rows)
                state = tl.load(y_ptr + before * (2 * H) + d * H + c, mask & within, 0.0)
                initial = h0_ptr + (d * batch + row - d * (rows - batch)) * H + c
                state = tl.where(within, state, tl.load(initial, mask & ~within, 0.0))
                tl.store(h_prev_ptr + row * (2 * H) + d * H + c, state, mask)
            if sums_ptr is not None:
                dgi = dgi_ptr + row * (6 * H) + d * (3 * H) + c
                r += tl.load(dgi, mask, 0.0).to(tl.float32)
                z += tl.load(dgi + H, mask, 0.0).to(tl.float32)
                n += tl.load(dgi + 2 * H, mask, 0.0).to(tl.float32)
                q += tl.load(dq_ptr + row * (2 * H) + d * H + c, mask, 0.0).to(tl.float32)
        if sums_ptr is not None:
            # b_ih's r, z, n, then b_hh's, of which r and z are the same.
            c = c0 + tl.arange(0, COLUMNS)
            sums = sums_ptr + (tl.program_id(0) * 2 + d) * (6 * H) + c
            db_r, db_z = tl.sum(r, 0), tl.sum(z, 0)
            tl.store(sums, db_r, c < H)
            tl.store(sums + H, db_z, c < H)
            tl.store(sums + 2 * H, tl.sum(n, 0), c < H)
            tl.store(sums + 3 * H, db_r, c < H)
            tl.store(sums + 4 * H, db_z, c < H)
            tl.store(sums + 5 * H, tl.sum(q, 0), c < H)


LAUNCHER = Launcher(collect_kernel)


class Wanted(NamedTuple):
    """What is collected; the kernel's configuration."""

    states: bool
    sums: bool

    def constants(self) -> dict[str, Any]:
        """Returns the kernel's compile-time arguments."""
        return {"ROWS": ROWS, "COLUMNS": COLUMNS}

    def options(self) -> dict[str, Any]:
        """Returns the compiler's options."""
        return {"num_warps": 4, "enable_fp_fusion": True}
