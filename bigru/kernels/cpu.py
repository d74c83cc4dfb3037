"""The backend "cpu": whole layers in C on a CPU, input product and recurrence in one call, for fp32 and fp64.

The arithmetic is in cpu_recurrence.c, an optional extension of the package that setup.py builds once for each
instruction set.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bigru.kernels.config import Call
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.varlen import Varlen, steps_and_table

INSTRUCTIONS = ("avx512", "avx2", "base")
"""The instruction sets that the extension is built for, the fastest first; "base" runs on every machine."""
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class CpuKernel(Kernel):
    """Serves fp32 and fp64 on a CPU, also sequences of different lengths."""

    name = "cpu"
    rule = "nowhere slower than ATen's GRU in PERFORMANCE.md's record"

    instructions: str
    """One of `INSTRUCTIONS`, or "none" where the extension was not built."""

    def refusal(self, call: Call) -> str | None:
        if self.instructions == "none":
            return "its C extension is not built beside the package (in a clone: pip install -e .)"
        if call.device.type != "cpu":
            return f"the input is on {call.device.type}, and the kernel runs on a CPU"
        if call.dtype not in DTYPES:
            return f"the input is {call.dtype}, and the kernel takes float32 and float64"
        return None

    def is_proven(self, call: Call) -> bool:
        """Returns whether "auto" takes the kernel: not for a few steps, where ATen's GRU is faster.

        Each call packs W_hh, 3H^2 numbers a direction, which so many steps repay. Measured beside nn.GRU on one and
        two threads of an AMD EPYC (Zen 3) at B = 1, 8, 64 and 256: at H = 32 and 128 from T = 2 on the kernel was never
        slower, at H = 256 from T = 8 on, at H = 512 from T = 30 on (0.98 times as fast at worst).
        """
        return call.steps is None or call.steps >= max(2, -(-(call.hidden**2) // 8192))

    def forward(self, operands: Forward, config: None) -> None:
        gi, w_hh, b_hn, h0, y, h_n, gates, varlen, _ = operands
        weights = [(None, None), w_hh, (None, None), (None, None), (None, None) if b_hn is None else b_hn]
        self._forward(gi, (0, 0), weights, h0, y, h_n, gates, varlen)

    def backward(self, operands: Backward, config: None) -> None:
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen, h_prev = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        # dy may have other strides than y over time and batch.
        strides = (0, dy.stride(0)) if varlen is not None else dy.stride()[:2]
        tensors = dy, dh_n, y, gates, h0, *w_hh, table, dgi, dq, dh0, h_prev
        extension(self.instructions, y.dtype).backward(
            torch.get_num_threads(), *map(_address, tensors), steps, batch, hidden, *strides
        )

    def products(
        self, x: Tensor, y: Tensor, h0: Tensor, dgi: Tensor, dq: Tensor, weights: Sequence[Tensor],
        varlen: Varlen | None, needs: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Computes the gradients of x and of the weights from the recurrence's, where they are needed."""
        wanted = [t.new_empty(t.shape) if need else None for t, need in zip((x, *weights), needs, strict=True)]
        if h0.shape[1] == 0:
            return [None if gradient is None else gradient.zero_() for gradient in wanted]
        steps, table = steps_and_table(y, varlen)
        _, batch, hidden = h0.shape
        half = len(weights) // 2
        # The gradients of w_ih, w_hh, b_ih and b_hh, each of both directions.
        pairs = [gradient for d in zip(wanted[1 : half + 1], wanted[half + 1 :], strict=True) for gradient in d]
        pairs += [None] * (8 - len(pairs))
        tensors = x, y, h0, dgi, dq, weights[0], weights[half], table, wanted[0], *pairs
        strides = (0, x.stride(0)) if varlen is not None else x.stride()[:2]
        extension(self.instructions, x.dtype).products(
            torch.get_num_threads(), *map(_address, tensors),
            y.numel() // (2 * hidden), steps, batch, x.shape[-1], hidden, *strides,
        )  # fmt: skip
        return wanted

    def layer(
        self, x: Tensor, h0: Tensor, weights: Sequence[Tensor], varlen: Varlen | None = None, batch_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Runs a layer, with gradients as one node of autograd.

        Args:
            x: (T, B, I) input, or (P, I) with a `varlen`; of any strides over time and batch.
            h0: (D, B, H) initial states.
            weights: as for `bigru.kernels.layer.fused_gru_layer`, of the right shapes and of x's dtype.
            varlen: the layout of sequences of different lengths.
            batch_first: whether y is returned as (B, T, D * H).

        Returns:
            y (T, B, D * H), or (P, D * H), no view, and h_n (D, B, H).
        """
        x, h0 = x.resolve_neg(), h0.resolve_neg()  # they are read by address
        x = x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()
        h0, weights = h0.contiguous(), [weight.contiguous() for weight in weights]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, h0, *weights)):
            y, h_n = _Layer.apply(x, h0, varlen, batch_first, self, *weights)
            return y, h_n
        y, h_n, _ = self._run_layer(x, h0, weights, varlen, batch_first, save=False)
        return y, h_n

    def _run_layer(
        self, x: Tensor, h0: Tensor, weights: Sequence[Tensor], varlen: Varlen | None, batch_first: bool, save: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns y and h_n as `layer` does, and the gates if `save`."""
        _, batch, hidden = h0.shape
        rows = x.shape[:-1]
        y, h_n = x.new_empty(*rows, 2 * hidden), torch.empty_like(h0)
        gates = x.new_empty(*rows, 2, 4, hidden) if save else None
        half = len(weights) // 2
        w_ih, w_hh, *biases = zip(weights[:half], weights[half:], strict=True)
        none = None, None
        b_ih, b_hh = biases or (none, none)
        strides = (0, x.stride(0)) if varlen is not None else x.stride()[:2]
        if batch > 0:
            self._forward(x, strides, [w_ih, w_hh, b_ih, b_hh, none], h0, y, h_n, gates, varlen)
        return y.transpose_(0, 1) if batch_first else y, h_n, gates

    def _forward(
        self, x: Tensor, strides: tuple[int, ...], weights: Sequence[Any], h0: Tensor, y: Tensor, h_n: Tensor,
        gates: Tensor | None, varlen: Varlen | None,
    ) -> None:  # fmt: skip
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        pairs = [tensor for pair in weights for tensor in pair]
        extension(self.instructions, x.dtype).forward(
            torch.get_num_threads(), *map(_address, (x, *pairs, h0, table, y, h_n, gates)),
            steps, batch, x.shape[-1], hidden, *strides,
        )  # fmt: skip


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, varlen: Varlen | None, batch_first: bool, kernel: CpuKernel, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, h_n, gates = kernel._run_layer(x, h0, weights, varlen, batch_first, save=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, gates, h0, *weights)
        ctx.varlen, ctx.batch_first, ctx.kernel = varlen, batch_first, kernel
        return y, h_n

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, gates, h0, *weights = ctx.saved_tensors
        needs_x, needs_h0, _, _, _, *needs = ctx.needs_input_grad
        varlen, half, hidden = ctx.varlen, len(weights) // 2, h0.shape[2]
        if ctx.batch_first:
            y, dy = y.transpose(0, 1), None if dy is None else dy.transpose(0, 1)
        batched = any(torch._C._functorch.is_legacy_batchedtensor(g) for g in (dy, dh_n) if g is not None)
        if torch.is_grad_enabled() or batched:
            dx, dh0, *dw = _differentiable_gradients(x, h0, weights, varlen, dy, dh_n, [needs_x, needs_h0, *needs])
            return dx, dh0, None, None, None, *dw
        # A hook of saved tensors may have given them back in another layout.
        x = x if x.stride(-1) == 1 else x.contiguous()
        y, gates, h0, *weights = (tensor.contiguous() for tensor in (y, gates, h0, *weights))
        y = y.unflatten(-1, (2, hidden))
        dy = torch.zeros_like(y) if dy is None else dy.unflatten(-1, (2, hidden))
        dy = dy.resolve_neg()
        dy = dy if dy.stride()[-2:] == (hidden, 1) else dy.contiguous()
        dh_n = torch.zeros_like(h0) if dh_n is None else dh_n.resolve_neg().contiguous()
        dgi, dh0 = y.new_empty(*y.shape[:-1], 3 * hidden), torch.empty_like(h0)
        dq = torch.empty_like(y)
        if h0.shape[1] > 0:
            w_hh: Any = weights[1], weights[half + 1]  # of each direction, where they lie
            ctx.kernel.backward(Backward(dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen), None)
        dx, *dw = ctx.kernel.products(x, y, h0, dgi, dq, weights, varlen, [needs_x, *needs])
        return dx, dh0 if needs_h0 else None, None, None, None, *dw


def _differentiable_gradients(
    x: Tensor, h0: Tensor, weights: Sequence[Tensor], varlen: Varlen | None, dy: Tensor | None, dh_n: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of x, h0 and the weights as ATen's GRU computes them, which can be differentiated again."""
    inputs = [x, h0, *weights]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    options = len(weights) == 8, 1, 0.0, True, True
    with torch.enable_grad():
        if varlen is None:
            y, h_n = torch._VF.gru(x, h0, list(weights), *options, False)
        else:
            y, h_n = torch._VF.gru(x, varlen.batch_sizes, h0, list(weights), *options)
        given = [(output, gradient) for output, gradient in ((y, dy), (h_n, dh_n)) if gradient is not None]
        outputs, gradients = zip(*given, strict=True)
    found = iter(
        torch.autograd.grad(outputs, wanted, gradients, create_graph=torch.is_grad_enabled(), allow_unused=True)
    )
    return [next(found) if need else None for need in needed]


def best_instructions() -> str:
    """Returns the fastest of `INSTRUCTIONS` that this processor has, by ATen's account, and that was built, or "none".

    ATen's own level is taken, so the environment variable ATEN_CPU_CAPABILITY holds here too.
    """
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    for name in INSTRUCTIONS[INSTRUCTIONS.index(level) :]:
        try:
            extension(name, torch.float32), extension(name, torch.float64)
        except ImportError:  # not built, or built against another system
            continue
        return name
    return "none"


@functools.cache
def extension(instructions: str, dtype: torch.dtype) -> ModuleType:
    """Returns the C extension built for an instruction set and a dtype.

    Raises:
        ModuleNotFoundError: it was not built.
    """
    return importlib.import_module(f"bigru.kernels._cpu_{instructions}_{str(dtype).removeprefix('torch.')}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


KERNEL = CpuKernel(best_instructions())
