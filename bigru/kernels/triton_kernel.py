"""The backend "triton": both directions in one launch, on any GPU that Triton supports and in its interpreter.

Its recurrent weights are persistent up to H = 128 (`bigru.kernels.persistent`) and streamed above
(`bigru.kernels.streamed`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bigru.kernels.cell import INTERPRETED
from bigru.kernels.config import Call, TritonConfig, choose_triton, gpu_refusal
from bigru.kernels.kernel import Backward, Forward, Kernel, launch_backward, launch_forward
from bigru.kernels.persistent import gru_backward_kernel, gru_forward_kernel
from bigru.kernels.proven import Proven, proven_for
from bigru.kernels.streamed import gru_backward_streamed_kernel, gru_forward_streamed_kernel
from bigru.kernels.varlen import steps_and_table


@dataclass(frozen=True)
class TritonKernel(Kernel):
    """Serves every H, sequences of different lengths, and CPU tensors in Triton's interpreter."""

    name = "triton"
    widths = (16, 32, 64, 100, 128, 200)  # each padded size, and two that need padding
    varlen_widths = (16, 128, 200)  # least and most that is persistent, and one that is streamed
    interpreted: bool = INTERPRETED
    """True if the kernels run in Triton's interpreter, on CPU tensors."""
    proven: tuple[Proven, ...] | None = proven_for("triton")

    def refusal(self, call: Call) -> str | None:
        return gpu_refusal(call, self.interpreted)

    def choose(self, call: Call, batch: int) -> TritonConfig:
        return choose_triton(call, batch)

    def forward(self, operands: Forward, config: TritonConfig) -> None:
        if config.persistent:
            launch_forward(gru_forward_kernel, operands, config, ACCURATE=config.accurate)
            return
        gi, w_hh, b_hn, h0, y, h_n, gates, varlen = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        state = torch.empty((2, *h0.shape), dtype=torch.float32, device=gi.device)
        state.copy_(h0)
        gru_forward_streamed_kernel[-(-batch // config.rows), 2](
            gi, w_hh, gi if b_hn is None else b_hn, state, y, gates, table, steps, batch, hidden, H=hidden,
            HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0, ACCURATE=config.accurate, **config.constants(),
            **config.options(varlen is not None),
        )  # fmt: skip
        h_n.copy_(state[steps % 2])

    def backward(self, operands: Backward, config: TritonConfig) -> None:
        if config.persistent:
            launch_backward(gru_backward_kernel, operands, config)
            return
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, varlen, h_prev = operands
        _, batch, hidden = h0.shape
        steps, table = steps_and_table(y, varlen)
        dh = dh_n.to(torch.float32, copy=True)
        gru_backward_streamed_kernel[-(-batch // config.rows), 2](
            dy, y, gates, h0, w_hh, dh, dgi, dq, table, h_prev, steps, batch, hidden, H=hidden, **config.constants(),
            **config.options(varlen is not None),
        )  # fmt: skip
        dh0.copy_(dh)

    def functions(self, config: TritonConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        if config.persistent:
            return {"forward": (gru_forward_kernel, {}), "backward": (gru_backward_kernel, {})}
        return {
            "forward": (gru_forward_streamed_kernel, {"state_ptr": "*fp32"}),
            "backward": (gru_backward_streamed_kernel, {"dh_ptr": "*fp32"}),
        }


KERNEL = TritonKernel()
