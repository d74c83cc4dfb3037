"""The recurrence with W_hh resident in registers, as Gluon kernels for warp-level MMA (compute capability 8.0 on).

As in `bigru.kernels.triton_kernel`, one program serves a block of batch rows and one direction, the products are
transposed, gates^T[H, N] = W_hh[H, H] @ h^T[H, N], and the time loop is inside. What differs is where things lie:

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

Gradients have no bound, so for fp32 storage the backward kernel scales them before they become fp16, by batch row: by
the largest of each warp's 16 units, which no other warp waits for, or, where that takes more registers than there are,
by the largest of all units.

Hidden units and batch rows past the end repeat the last one: they read what it reads, compute what it computes and
store the same values to the same places, so that no step needs a mask. Sequences of different lengths lie and are
served as in `bigru.kernels.triton_kernel`: a program makes as many steps as its longest sequence has, and a mask leaves
out the sequences that have no row at a step.

Pointers are to the operands that `bigru.kernels.kernel` describes, the gates (T, B, D, H, 4), r, z, n, q side by side;
`varlen_ptr` is to `Varlen.table` or None. HP is H padded to a power of two, N the rows of a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bigru.kernels.config import ONE_PROCESSOR, Call, ResidentConfig, choose_resident, gpu_refusal, padded_to_power
from bigru.kernels.kernel import Backward, Forward, Kernel
from bigru.kernels.launch import Launcher, Launchers, launch_backward, launch_forward
from bigru.kernels.mend import mend
from bigru.kernels.resident_backward import gru_backward_resident_kernel
from bigru.kernels.resident_forward import gru_forward_resident_kernel

FORWARD, BACKWARD = Launcher(gru_forward_resident_kernel), Launcher(gru_backward_resident_kernel)


@dataclass(frozen=True)
class ResidentKernel(Kernel):
    """Serves H up to 128, on a GPU."""

    name = "resident"
    widths = (16, 32, 64, 100, 128)
    varlen_widths = (16, 64, 128)
    steps_a_turn = 2

    def refusal(self, call: Call) -> str | None:
        if reason := gpu_refusal(call):
            return reason
        if call.hidden > ONE_PROCESSOR:
            return f"hidden_size is {call.hidden}, and W_hh fits the registers up to {ONE_PROCESSOR}"
        if call.varlen and call.dtype == torch.float32 and padded_to_power(call.hidden) == ONE_PROCESSOR:
            # The backward kernel would spill: 8 to 48 bytes in precision "fp32", and with triton 3.9 also 8 in "tf32".
            return f"hidden_size is {call.hidden}, and W_hh leaves too few registers for a PackedSequence in fp32"
        return None

    def choose(self, call: Call, batch: int) -> ResidentConfig:
        return choose_resident(call, batch)

    def gates_shape(self, rows: tuple[int, ...], hidden: int) -> tuple[int, ...]:
        return (*rows, hidden, 4)

    def forward(self, operands: Forward, config: ResidentConfig) -> None:
        launch_forward(FORWARD, operands, config)
        mend(operands, gates_innermost=True)

    def backward(self, operands: Backward, config: ResidentConfig) -> None:
        launch_backward(BACKWARD, operands, config)

    def launchers(self, config: ResidentConfig, hidden: int) -> Launchers:
        return Launchers(FORWARD, {}, BACKWARD, mended=(4, 1))

    def functions(self, config: ResidentConfig) -> dict[str, tuple[Any, dict[str, str]]]:
        return {"forward": (gru_forward_resident_kernel, {}), "backward": (gru_backward_resident_kernel, {})}


KERNEL = ResidentKernel()
