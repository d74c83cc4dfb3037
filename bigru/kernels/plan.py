"""`Plan`: a layer in the kernels that are launched, with all that follows from shapes and dtypes worked out once.

At the sizes people train, the GPU waits for the host. What Python would do over again in every call, and operators that
make nothing but views, take longer than the recurrence. So a pass takes its memory in few pieces, and launches are told
where in them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigru.kernels import collect, gather, mend, registry
from bigru.kernels.config import Call, describe
from bigru.kernels.kernel import Backward, Forward
from bigru.kernels.launch import Launch, Launchers
from bigru.kernels.varlen import Varlen

View = tuple[tuple[int, ...], tuple[int, ...], int]
"""A view, as `Tensor.as_strided` takes it: shape, strides, first number."""


class Plan:
    """The calls of a layer that differ in their numbers alone; all run outside autograd, on the current device.

    Args:
        kernel, precision: as for `bigru.kernels.layer.fused_gru_layer`.
        device: of all tensors.
        dtypes: of the input, of each weight, and of the call, which all are converted to.
        shape: of the input, (T, B, I) or (P, I); (B, T, I) if `swaps_x`.
        strides: the input's.
        hidden: H.
        batch: B.
        ragged: whether a `Varlen` says which rows make a step.
        zeros: whether there are no initial states.
        first: where in the memory for h_n this layer's begins.
        swaps_x, swaps_y: whether x comes, and y is returned, with the batch first.
    """

    def __init__(
        self, kernel: str, precision: str, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: torch.Size,
        strides: tuple[int, ...], hidden: int, batch: int, ragged: bool, zeros: bool, first: int, swaps_x: bool,
        swaps_y: bool,
    ) -> None:  # fmt: skip
        *rows, inputs = shape
        if swaps_x:
            rows, strides = rows[::-1], (strides[1], strides[0], strides[2])
        count, self.dtype, biased = math.prod(rows), dtypes[-1], len(dtypes) == 10
        self.kernel, self.given, self.count, self.hidden = registry.get(kernel), not zeros, count, hidden
        self.index = -1 if device.index is None else device.index
        # What is gathered: w_hh (D, 3H, H), then all else.
        layout = gather.lay_out(hidden, inputs, biased, batch * zeros, dtypes)
        w_ih, bias, b_hn, h0, x = layout.starts
        self.converts = any(dtype != self.dtype for dtype in dtypes)
        of_x = _contiguous((*rows, inputs))
        differs = (n > 1 and own != other for n, own, other in zip((*rows, inputs), strides, of_x, strict=True))
        self.copied = dtypes[0] != self.dtype or (count > 0 and any(differs))
        self.gathered = x + count * inputs * self.copied
        columns = (rows[1], *strides) if len(rows) == 2 else (1, strides[0], 0, strides[1])
        self.gather = gather.LAUNCHER.prepare(layout, False, dtypes[1], self.index)
        self.gather_grid, self.gather_sizes = (-(-self.gathered // gather.BLOCK), 1, 1), (x, self.gathered, *columns)
        self.x: View = (count, inputs), (inputs, 1), x
        self.w_ih: View = (6 * hidden, inputs), (inputs, 1), w_ih
        self.w_ih_t: View = (inputs, 6 * hidden), (1, inputs), w_ih
        self.bias: View | None = ((6 * hidden,), (1,), bias) if biased else None
        self.b_hn: View = (2, hidden), (hidden, 1), b_hn
        self.state_shape, of_states = (2, batch, hidden), (batch * hidden, hidden, 1)
        self.h0: View = self.state_shape, of_states, h0
        # What the forward pass writes.
        self.y: tuple[tuple[int, ...], tuple[int, ...]] = _swapped((*rows, 2 * hidden), swaps_y)
        self.dx: tuple[tuple[int, ...], tuple[int, ...]] = _swapped((*rows, inputs), swaps_x)
        self.swaps_y = swaps_y
        self.gates_shape = self.kernel.gates_shape((*rows, 2), hidden)
        self.h_n: View = self.state_shape, of_states, first
        # What the backward pass writes: dgi (T, B, D, 3H), dq (T, B, D, H), dh0 (D, B, H) and the state before each
        # step (T, B, D, H), each from where a GPU reads fastest.
        pieces = [-(-n // 64) * 64 for n in (6 * hidden * count, 2 * hidden * count, 2 * hidden * batch)]
        dq, dh0, h_prev = itertools.accumulate(pieces)
        self.memory, self.memory_before = h_prev, h_prev + 2 * hidden * count
        self.dgi: View = (count, 6 * hidden), (6 * hidden, 1), 0
        self.dgi_t: View = (6 * hidden, count), (1, 6 * hidden), 0
        self.dgi_rz: View = (2, 2 * hidden, count), (3 * hidden, 1, 6 * hidden), 0
        self.dq_t: View = (2, hidden, count), (hidden, 1, 2 * hidden), dq
        self.before: View = (2, count, hidden), (hidden, 2 * hidden, 1), h_prev
        self.dh0: View = self.state_shape, of_states, dh0
        self.dw_hh_shape, of_weights = (2, 3 * hidden, hidden), (3 * hidden * hidden, hidden, 1)
        self.dw_rz: View = (2, 2 * hidden, hidden), of_weights, 0
        self.dw_n: View = (2, hidden, hidden), of_weights, 2 * hidden * hidden
        # Each program of `collect` sums a span of rows, and ATen what they make of them.
        span = max(collect.ROWS, -(-count // (collect.PROGRAMS * collect.ROWS)) * collect.ROWS)
        self.parts_shape, self.collect_sizes = (-(-count // span), 4, 3 * hidden), (count, span, batch)
        # What is launched; where in a tensor, in bytes.
        at, size = h0 * zeros, self.dtype.itemsize
        self.forward_offsets = [n * size for n in (0, 0, b_hn * biased, at, 0, first, 0, 0)]
        self.backward_offsets = [n * size for n in (0, 0, 0, 0, at, 0, 0, dq, dh0, 0, h_prev)]
        self.backward_offsets_zeros = [0, at * size, *self.backward_offsets[2:]]
        self.collect_offsets = [n * size for n in (0, dq, 0, at, h_prev, 0)]
        self.sizes = rows[0], batch
        self.config: Any = None
        self.forward_launches: tuple[Launch, Launch] | None = None  # without gates and with them
        self.mend_launches: tuple[Launch, Launch] | None = None
        self.backward_launch: Launch | None = None
        if batch > 0:
            self.config = self.kernel.choose(Call(describe(device), self.dtype, hidden, precision, ragged), batch)
            if launchers := self.kernel.launchers(self.config, hidden):
                self._prepare(launchers, biased, ragged)

    def _prepare(self, launchers: Launchers, biased: bool, ragged: bool) -> None:
        forward, constants, backward, mended = launchers
        _, batch, hidden = self.state_shape
        self.grid, self.mend_grid = (-(-batch // self.config.rows), 2, 1), (batch, 2, 1)
        key, constants = (ragged, self.dtype, self.index), {"H": hidden, "HAS_BIAS": biased, **constants}
        inference = forward.prepare(self.config, *key, SAVE=False, **constants)
        self.forward_launches = inference, forward.prepare(self.config, *key, SAVE=True, **constants)
        self.backward_launch = backward.prepare(self.config, *key, H=hidden)
        if self.given and mended is not None and self.dtype == torch.float32:
            self.gates_strides, prepare = mended, mend.LAUNCHER.prepare
            self.mend_launches = prepare(mend.Mended(biased, False), *key), prepare(mend.Mended(biased, True), *key)

    def forward(
        self, x: Tensor, h0: Tensor | None, weights: Sequence[Tensor], varlen: Varlen | None, save: bool,
        h_n: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
        """Runs the forward pass.

        Args:
            x: the input.
            h0: (D, B, H) initial states, contiguous and of the call's dtype, unless there are none.
            weights: as for `bigru.kernels.layer.fused_gru_layer`, of its shapes.
            varlen: the layout, if it is ragged.
            save: whether to keep what the gradients take.
            h_n: contiguous memory for h_n, of this layer and others.

        Returns:
            y (T, B, D * H), or (P, D * H), no view; h_n; the gates, None unless `save`; and what was gathered.

        Raises:
            RuntimeError: a weight is on another device, or has no memory.
        """
        out = x.new_empty(self.gathered, dtype=self.dtype)
        # A kernel would read anywhere.
        if not all(map(Tensor.data_ptr, weights)) or {*map(Tensor.get_device, weights)} != {x.get_device()}:
            found = [str(weight.device) for weight in weights]
            raise RuntimeError(f"weights: expected all in memory on {x.device} like input, got {found}")
        if not all(map(Tensor.is_contiguous, weights)):
            weights = [weight.contiguous() for weight in weights]
        if self.bias is None:
            weights = [*weights[:2], out, out, *weights[2:], out, out]
        self.gather(self.gather_grid, (*weights, x, out), self.gather_sizes)
        rows = out.as_strided(*self.x) if self.copied else x.view(self.x[0])
        if self.bias is None:
            gi = torch.mm(rows, out.as_strided(*self.w_ih_t))
        else:
            gi = torch.addmm(out.as_strided(*self.bias), rows, out.as_strided(*self.w_ih_t))
        # No view, and no row more than there are steps: y may be detached in place, and is saved as it is.
        y = gi.new_empty_strided(*self.y)
        gates = gi.new_empty(self.gates_shape) if save else None
        h_n = gi.new_empty(self.state_shape) if h_n is None else h_n
        if self.forward_launches is not None:
            b_hn, kept = gi if self.bias is None else out, y if gates is None else gates
            start, table = out if h0 is None else h0, None if varlen is None else varlen.table
            sizes = self.sizes if varlen is None else (varlen.steps, varlen.batch)
            tensors = gi, out, b_hn, start, y, h_n, kept, table
            self.forward_launches[save](self.grid, tensors, sizes, self.forward_offsets)
            if self.mend_launches is not None:
                mended = gi, out, None if self.bias is None else out, start, y, h_n, gates, table
                about = *sizes, self.hidden, *self.gates_strides
                self.mend_launches[save](self.mend_grid, mended, about, self.forward_offsets)
        elif self.config is not None:
            biases = None if self.bias is None else out.as_strided(*self.b_hn)
            start, last = self._states(h0, out), h_n.as_strided(*self.h_n)
            states = y.transpose(0, 1) if self.swaps_y else y
            self.kernel.forward(Forward(gi, out, biases, start, states, last, gates, varlen, self.given), self.config)
        return y, h_n, gates, out

    def backward(
        self, dy: Tensor | None, dh_n: Tensor | None, y: Tensor, gates: Tensor, x: Tensor | None, h0: Tensor | None,
        out: Tensor, varlen: Varlen | None, wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Runs the backward pass.

        Args:
            dy, dh_n: gradients of y and h_n; None for zeros.
            y, gates, out: as `forward` returned them.
            x: the input; None if it was gathered.
            h0, varlen: as for `forward`.
            wanted: whether the gradients of x, h0, w_ih, w_hh and the biases are.

        Returns:
            The gradients, None for what is not wanted: of x (T, B, I), or (P, I), of h0 and of both directions' w_ih,
            w_hh, b_ih and b_hh.
        """
        for_x, for_h0, for_w_ih, for_w_hh, for_biases = wanted
        # A hook of saved tensors may have given them back in another layout.
        gates, h0 = gates.contiguous(), None if h0 is None else h0.contiguous()
        if out.storage_offset() or not out.is_contiguous():
            out = out.clone(memory_format=torch.contiguous_format)
        if y.stride() != self.y[1]:
            y = y.new_empty_strided(*self.y).copy_(y)
        if self.swaps_y and dy is not None:
            dy = dy.transpose(0, 1)
        before = for_w_hh or varlen is not None
        memory = y.new_empty(self.memory_before if before else self.memory)
        dy = torch.zeros_like(y) if dy is None else dy.contiguous()
        offsets = self.backward_offsets
        if dh_n is not None:
            dh_n = dh_n.contiguous()
        elif h0 is None and self.backward_launch is not None:
            dh_n, offsets = out, self.backward_offsets_zeros
        else:
            dh_n = y.new_zeros(self.state_shape)
        if self.backward_launch is not None:
            start, table = out if h0 is None else h0, None if varlen is None else varlen.table
            tensors = dy, dh_n, y, gates, start, out, memory, memory, memory, table, None if varlen is None else memory
            sizes = self.sizes if varlen is None else (varlen.steps, varlen.batch)
            self.backward_launch(self.grid, tensors, sizes, offsets)
        elif self.config is not None:
            dq, dh0 = memory[self.dq_t[2] :], memory.as_strided(*self.dh0)
            h_prev = None if varlen is None else memory[self.before[2] :]
            states = y.transpose(0, 1) if self.swaps_y else y
            operands = Backward(dy, dh_n, states, gates, self._states(h0, out), out, memory, dq, dh0, varlen, h_prev)
            self.kernel.backward(operands, self.config)
        sums = self._collect(y, h0, out, memory, for_w_hh and varlen is None, for_biases)
        gradients: list[Tensor | None] = [None] * 10
        if for_x:
            dx = torch.mm(memory.as_strided(*self.dgi), out.as_strided(*self.w_ih))
            gradients[0] = dx.as_strided(*self.dx)
        if for_h0:
            gradients[1] = memory.as_strided(*self.dh0).clone()
        if for_w_ih:
            dw_ih = torch.mm(
                memory.as_strided(*self.dgi_t), out.as_strided(*self.x) if x is None else x.reshape(self.x[0])
            )
            gradients[2], gradients[6] = dw_ih.chunk(2)
        if for_w_hh:
            dw_hh, h_prev = y.new_empty(self.dw_hh_shape), memory.as_strided(*self.before)
            torch.bmm(memory.as_strided(*self.dgi_rz), h_prev, out=dw_hh.as_strided(*self.dw_rz))
            torch.bmm(memory.as_strided(*self.dq_t), h_prev, out=dw_hh.as_strided(*self.dw_n))
            gradients[3], gradients[7] = dw_hh.unbind()
        if sums is not None:
            gradients[4], gradients[5], gradients[8], gradients[9] = sums.unbind()
        return gradients

    def _states(self, h0: Tensor | None, out: Tensor) -> Tensor:
        """The initial states, or the zeros that stand for them."""
        return out.as_strided(*self.h0) if h0 is None else h0

    def _collect(
        self, y: Tensor, h0: Tensor | None, out: Tensor, memory: Tensor, states: bool, sums: bool
    ) -> Tensor | None:
        """Collects the state before each step in its memory; returns the gradients of the biases (2D, 3H)."""
        parts = y.new_empty(self.parts_shape, dtype=torch.float32) if sums else None
        if self.count and (states or sums):
            launch = collect.LAUNCHER.prepare(
                collect.Wanted(states, sums), False, self.dtype, self.index, H=self.hidden
            )
            tensors = memory, memory, y, out if h0 is None else h0, memory if states else None, parts
            launch((self.parts_shape[0], 2, 1), tensors, self.collect_sizes, self.collect_offsets)
        return None if parts is None else parts.sum(0, dtype=y.dtype)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))


def _swapped(shape: tuple[int, ...], swaps: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a contiguous tensor, or of its view with the first two swapped."""
    strides = _contiguous(shape)
    if swaps:
        return (shape[1], shape[0], shape[2]), (strides[1], strides[0], strides[2])
    return shape, strides


plan_of = functools.lru_cache(maxsize=1024)(Plan)
