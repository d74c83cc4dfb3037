"""Which kernel serves which shape, dtype and device, and the launch itself."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from bigru.kernels import blocked, cooperative, portable
from bigru.kernels.packed import Packing
from bigru.kernels.proven import PROVEN

Precision = Literal["fp32", "tf32"]

KERNELS = ("portable", "resident", "cooperative")
"""The families of kernels; `resident` and `cooperative` are experimental outside `proven.PROVEN`."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RESIDENT = 128
"""Largest H whose recurrent weights the registers of one program hold."""
OLDEST = (8, 0)
"""Compute capability of the first GPUs with TF32 and bf16 products."""


@dataclass(frozen=True)
class Device:
    """What the choice of a kernel depends on."""

    capability: tuple[int, int]
    shared_memory: int
    """Shared memory that one program may use, in bytes."""
    processors: int
    """Streaming multiprocessors."""


# Limits from the CUDA C++ Programming Guide, "Compute Capabilities": 163, 227 and 227 KiB a block.
A100 = Device((8, 0), 163 * 1024, 108)
H100 = Device((9, 0), 227 * 1024, 132)
B200 = Device((10, 0), 227 * 1024, 148)


@dataclass(frozen=True)
class LaunchConfig:
    """How one call runs."""

    whole: bool
    """W_hh on chip for the whole sequence; else it is read in blocks at every step."""
    block_batch: int
    """Batch rows of one program."""
    block_hidden: int
    """Hidden units of one block: H padded to a power of two if `whole`."""
    num_warps: int
    split: bool
    """fp32 products as three of fp16 (high and low parts of both factors, scaled)."""
    dot: Literal["ieee", "tf32", "tf32x3"]
    """`input_precision` of tl.dot where operands are fp32 and not split."""

    def options(self, packed: bool = False) -> dict[str, int | bool]:
        """What the compiler is told, also for packed sequences."""
        # Fusion of multiply and add is the default; triton 3.9 warns where it is not asked for by name.
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        # Left to itself, ptxas stops at 64, 80, 128 or 168 registers in these kernels and spills.
        return options | {"maxnreg": 255} if packed or not self.whole else options


def choose(hidden: int, dtype: torch.dtype, precision: Precision, batch: int, device: Device) -> LaunchConfig:
    """Picks the kernel and its parameters.

    Args:
        hidden: H.
        dtype: storage dtype, one of `DTYPES`.
        precision: accuracy of the recurrence's products for fp32 storage.
        batch: B.
        device: the GPU.
    """
    wide = dtype == torch.float32
    accurate = wide and precision == "fp32"
    padded = max(16, triton.next_power_of_2(hidden))
    # Eight rows a program spread a small batch over the most processors; sixteen halve the work per row once every
    # processor has a program. From compute capability 10 on, sixteen rows would go through tensor memory and spill.
    programs = 2 * triton.cdiv(batch, 8)
    rows = 16 if programs > device.processors and device.capability < (10, 0) else 8
    # Compiled for sm_80, sm_90 and sm_100: W_hh, whole or as two fp16 halves, plus at most three tiles of the state.
    needed = 3 * padded * padded * (4 if wide else 2) + 3 * padded * rows * 4
    if padded <= 128 and needed <= device.shared_memory:
        # Of the ways to fp32 only two 16-bit parts fit here: ieee (FMA) spills kilobytes at H=128, tf32x3 needs 400 KB.
        # fp16 rather than bf16 parts: scaled, they are ten times as accurate (1e-7 against 1e-6) at the same cost.
        # One warp for every 16 hidden units, the rows of one MMA, so that no warp repeats another's work; but TF32
        # products spill in tensor memory's layout with 8.
        warps = 16 if wide and not accurate and padded == 128 and device.capability >= (10, 0) else padded // 16
        return LaunchConfig(True, rows, padded, warps, split=accurate, dot="tf32")
    # The largest blocks that spill on no architecture.
    if accurate:
        return LaunchConfig(False, 16, min(32, padded), 8, split=False, dot="tf32x3")
    return LaunchConfig(False, 16, min(64, padded), 8, split=False, dot="tf32")


@dataclass(frozen=True)
class ResidentConfig:
    """How one call of the resident kernels runs."""

    block_batch: int
    """Batch rows of one program."""
    padded: int
    """H padded to a power of two."""
    split: bool
    """Both factors of the products as two fp16 parts."""

    def options(self) -> dict[str, int | bool]:
        """What the compiler is told."""
        return {"num_warps": self.padded // 16, "enable_fp_fusion": True}


def choose_resident(
    hidden: int, dtype: torch.dtype, precision: Precision, batch: int, device: Device
) -> ResidentConfig:
    """Picks the parameters of the resident kernels; arguments as for `choose`."""
    padded = max(16, triton.next_power_of_2(hidden))
    split = dtype == torch.float32 and precision == "fp32"
    # The narrowest block spreads a small batch over the most processors, and its step is the shortest. Two parts of a
    # row take two of the MMA's eight columns.
    rows = 4 if split else 8
    # Once there are more programs than fit at once, twice the rows a program take less than twice the time a step,
    # where there are registers for it: at H=128 W_hh leaves too few but with 16-bit storage. Below 64, many programs
    # fit on a processor.
    at_once = device.processors * (128 // padded)
    if 2 * triton.cdiv(batch, rows) > at_once and (padded == 64 or (padded == 128 and dtype != torch.float32)):
        rows *= 2
    return ResidentConfig(rows, padded, split)


def refusal(
    kernel: str, hidden: int, dtype: torch.dtype, precision: str, device: Device, packed: bool = False
) -> str | None:
    """Why a family of kernels cannot serve H, dtype and precision on a device, or None if it can."""
    if packed and kernel != "portable":
        return "the input is a PackedSequence"
    if device.capability < OLDEST:
        return (
            f"the GPU's compute capability is {device.capability[0]}.{device.capability[1]}, and the kernels need 8.0"
        )
    if dtype not in DTYPES:
        return f"the input is {dtype}, and the kernels take float32, bfloat16 and float16"
    if kernel == "resident" and hidden > MAX_RESIDENT:
        return f"hidden_size is {hidden}, and W_hh fits the registers up to {MAX_RESIDENT}"
    if kernel == "cooperative":
        return cooperative.refusal(hidden, dtype, precision, device)
    return None


def preferred(hidden: int, dtype: torch.dtype, precision: str, device: Device) -> str:
    """The family of kernels that "auto" takes on a device: one that a recorded run has proven, else "portable"."""
    for entry in PROVEN:
        if entry.covers(hidden, str(dtype).removeprefix("torch."), precision, device.capability):
            return entry.kernel
    return "portable"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on CPU tensors."""
    return not isinstance(portable.gru_forward_kernel, triton.runtime.JITFunction)


@functools.cache
def describe(device: torch.device) -> Device:
    """What the choice of a kernel depends on, of a tensor's device."""
    if device.type != "cuda":
        return H100  # the interpreter takes the path of a large GPU
    properties = torch.cuda.get_device_properties(device)
    limit = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Device((properties.major, properties.minor), limit, properties.multi_processor_count)


def _on_device_of(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def gates_shape(kernel: str, *shape: int) -> tuple[int, ...]:
    """Shape of the saved gates for y's shape; it is private to a family of kernels."""
    *rows, hidden = shape
    return (*rows, *((hidden, 4) if kernel == "resident" else (4, hidden)))


def gru_forward(
    gi: Tensor,  # (T, B, D, 3H), or (P, D, 3H) with a packing
    w_hh: Tensor,  # (D, 3H, H)
    b_hn: Tensor | None,  # (D, H)
    h0: Tensor,  # (D, B, H)
    precision: Precision,
    save: bool,
    kernel: str = "portable",
    config: LaunchConfig | None = None,
    out: Tensor | None = None,  # (T, B, D, H), contiguous
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward recurrence.

    With a packing, which the portable kernels take, (T, B, ...) is (P, ...) here and in `gru_backward`.

    Returns:
        y (T, B, D, H), which is `out` if given; h_n (D, B, H); gates, empty unless `save`: (T, B, D, H, 4) from the
        resident kernels, (T, B, D, 4, H) from the others, for the backward kernel of the same family.
    """
    batch, hidden = h0.shape[1:]
    shape = *gi.shape[:-1], hidden
    gi, w_hh, h0 = gi.contiguous(), w_hh.contiguous(), h0.contiguous()
    b_hn = None if b_hn is None else b_hn.contiguous()
    y = gi.new_empty(shape) if out is None else out
    gates = gi.new_empty(gates_shape(kernel, *shape) if save else (0,))
    h_n = torch.empty_like(h0)
    if batch > 0:
        call = hidden, gi.dtype, precision, batch, describe(gi.device)
        operands, outputs = (gi, w_hh, b_hn, h0), (y, h_n, gates)
        with _on_device_of(gi):
            if kernel == "resident":
                _forward_resident(*operands, *outputs, choose_resident(*call))
            elif kernel == "cooperative":
                cooperative.forward(*operands, *outputs, cooperative.choose_cooperative(*call))
            else:
                accurate = gi.dtype == torch.float32 and precision == "fp32"
                _forward_portable(*operands, *outputs, config or choose(*call), accurate, packing)
    return y, h_n, gates


def _forward_portable(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, y: Tensor, h_n: Tensor, gates: Tensor, c: LaunchConfig,
    accurate: bool, packing: Packing | None,
) -> None:  # fmt: skip
    directions, batch, hidden = h0.shape
    steps, table = (len(y), None) if packing is None else (packing.steps, packing.table)
    bias = gi if b_hn is None else b_hn
    grid = (triton.cdiv(batch, c.block_batch), directions)
    if c.whole:
        portable.gru_forward_kernel[grid](
            gi, w_hh, bias, h0, y, h_n, gates, table, steps, batch,
            H=hidden, HP=c.block_hidden, N=c.block_batch, HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0,
            SPLIT=c.split, PRECISION=c.dot, ACCURATE=accurate, **c.options(packing is not None),
        )  # fmt: skip
    else:
        state = torch.empty((2, *h0.shape), dtype=torch.float32, device=gi.device)
        state.copy_(h0)
        blocked.gru_forward_blocked_kernel[grid](
            gi, w_hh, bias, state, y, gates, table, steps, batch, hidden,
            H=hidden, BH=c.block_hidden, N=c.block_batch, HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0,
            PRECISION=c.dot, ACCURATE=accurate, **c.options(packing is not None),
        )  # fmt: skip
        h_n.copy_(state[steps % 2])


def _forward_resident(
    gi: Tensor, w_hh: Tensor, b_hn: Tensor | None, h0: Tensor, y: Tensor, h_n: Tensor, gates: Tensor, c: ResidentConfig
) -> None:
    from bigru.kernels.resident import gru_forward_resident_kernel  # Gluon is needed from here on, not before

    steps, batch, directions, hidden = y.shape
    gru_forward_resident_kernel[triton.cdiv(batch, c.block_batch), directions](
        gi, w_hh, gi if b_hn is None else b_hn, h0, y, h_n, gates, steps, batch,
        H=hidden, HP=c.padded, N=c.block_batch, HAS_BIAS=b_hn is not None, SAVE=gates.numel() > 0, SPLIT=c.split,
        **c.options(),
    )  # fmt: skip


def gru_backward(
    dy: Tensor,  # (T, B, D, H)
    dh_n: Tensor,  # (D, B, H)
    y: Tensor,  # (T, B, D, H)
    gates: Tensor,  # as the forward kernel of the same family left them
    h0: Tensor,  # (D, B, H)
    w_hh: Tensor,  # (D, 3H, H)
    precision: Precision,
    kernel: str = "portable",
    config: LaunchConfig | None = None,
    packing: Packing | None = None,
    before: Tensor | None = None,  # (P, D, H), contiguous; with a packing, filled with the state before each step
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the backward recurrence.

    Returns:
        dgi (T, B, D, 3H), gradient of the gates' input side; dq (T, B, D, H), gradient of q; dh0 (D, B, H).
    """
    batch, hidden = h0.shape[1:]
    dy, dh_n, y, gates, h0, w_hh = (tensor.contiguous() for tensor in (dy, dh_n, y, gates, h0, w_hh))
    operands = dy, dh_n, y, gates, h0, w_hh
    dgi = y.new_empty(*y.shape[:-1], 3 * hidden)
    dq = torch.empty_like(y)
    dh0 = torch.empty_like(h0)
    if batch > 0:
        call = hidden, y.dtype, precision, batch, describe(y.device)
        outputs = dgi, dq, dh0
        with _on_device_of(y):
            if kernel == "resident":
                _backward_resident(*operands, *outputs, choose_resident(*call))
            elif kernel == "cooperative":
                cooperative.backward(*operands, *outputs, cooperative.choose_cooperative(*call))
            else:
                _backward_portable(*operands, *outputs, config or choose(*call), packing, before)
    return dgi, dq, dh0


def _backward_portable(
    dy: Tensor, dh_n: Tensor, y: Tensor, gates: Tensor, h0: Tensor, w_hh: Tensor, dgi: Tensor, dq: Tensor, dh0: Tensor,
    c: LaunchConfig, packing: Packing | None, before: Tensor | None,
) -> None:  # fmt: skip
    directions, batch, hidden = h0.shape
    steps, table = (len(y), None) if packing is None else (packing.steps, packing.table)
    grid = (triton.cdiv(batch, c.block_batch), directions)
    if c.whole:
        portable.gru_backward_kernel[grid](
            dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, table, before, steps, batch,
            H=hidden, HP=c.block_hidden, N=c.block_batch,
            SPLIT=c.split, PRECISION=c.dot, **c.options(packing is not None),
        )  # fmt: skip
    else:
        dh = dh_n.to(torch.float32, copy=True)
        blocked.gru_backward_blocked_kernel[grid](
            dy, y, gates, h0, w_hh, dh, dgi, dq, table, before, steps, batch, hidden,
            H=hidden, BH=c.block_hidden, N=c.block_batch, PRECISION=c.dot, **c.options(packing is not None),
        )  # fmt: skip
        dh0.copy_(dh)


def _backward_resident(
    dy: Tensor, dh_n: Tensor, y: Tensor, gates: Tensor, h0: Tensor, w_hh: Tensor, dgi: Tensor, dq: Tensor, dh0: Tensor,
    c: ResidentConfig,
) -> None:  # fmt: skip
    from bigru.kernels.resident import gru_backward_resident_kernel

    steps, batch, directions, hidden = y.shape
    gru_backward_resident_kernel[triton.cdiv(batch, c.block_batch), directions](
        dy, dh_n, y, gates, h0, w_hh, dgi, dq, dh0, steps, batch,
        H=hidden, HP=c.padded, N=c.block_batch, SPLIT=c.split, **c.options(),
    )  # fmt: skip
