"""The devices, and how each GPU kernel runs on them: all launch configurations, with the reasons for their numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Storage that the GPU kernels take."""
OLDEST = (8, 0)
"""Compute capability of the first GPUs with TF32 and bf16 products."""
ONE_PROCESSOR = 128
"""Largest H whose recurrent weights one multiprocessor holds: the registers of one program, or its shared memory."""
PTXAS_LIMIT = {"maxnreg": 255}
"""Left to itself, ptxas stops at 64, 80, 128 or 168 registers: some of the kernels spill, in others loads wait."""


@dataclass(frozen=True)
class Device:
    """The properties of a device on which the choice of a kernel and of its configuration depends."""

    type: str
    """As torch.device's, but "hip" for a GPU that is not one of NVIDIA's."""
    capability: tuple[int, int] = (0, 0)
    """On "hip", the first two numbers of the architecture: (9, 4) of gfx942."""
    shared_memory: int = 0
    """Shared memory that one program may use, in bytes."""
    processors: int = 0
    """Streaming multiprocessors, or AMD's compute units."""


# Limits from the CUDA C++ Programming Guide, "Compute Capabilities": 163, 227 and 227 KiB a block.
A100 = Device("cuda", (8, 0), 163 * 1024, 108)
H100 = Device("cuda", (9, 0), 227 * 1024, 132)
B200 = Device("cuda", (10, 0), 227 * 1024, 148)
# The kernels compile for AMD's gfx942 and gfx1100; none has run there.
MI300 = Device("hip", (9, 4), 64 * 1024, 304)
RDNA3 = Device("hip", (11, 0), 64 * 1024, 96)


@dataclass(frozen=True)
class Call:
    """The properties of a call on which the choice of a kernel and of its configuration depends."""

    device: Device
    dtype: torch.dtype
    """Storage dtype of all operands."""
    hidden: int
    """H."""
    precision: str = "fp32"
    """Accuracy of the recurrence's products for fp32 storage: "fp32" or "tf32". A kernel may be more accurate."""
    varlen: bool = False
    """True if the sequences have different lengths."""
    steps: int | None = None
    """T, of the longest sequence; None under a compiler, whose graph serves every T."""
    batch: int | None = None
    """B; None under a compiler too."""

    @property
    def accurate(self) -> bool:
        """True if products of fp32 numbers have fp32's accuracy."""
        return self.dtype == torch.float32 and self.precision == "fp32"


@functools.cache
def describe(device: torch.device) -> Device:
    """Returns the properties of a tensor's device."""
    if device.type != "cuda":
        return Device(device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Device("hip", (properties.major, properties.minor), 64 * 1024, properties.multi_processor_count)
    try:
        import triton
    except ModuleNotFoundError:
        limit = 0
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        limit = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Device("cuda", (properties.major, properties.minor), limit, properties.multi_processor_count)


def autocasts(device: str) -> bool:
    """Returns whether autocast is on for a type of device; there is none for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Returns a context in which autocast is off for a type of device."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def dtype_of_call(dtype: torch.dtype, device: str) -> torch.dtype:
    """Returns the dtype that an input is computed in: autocast's where it is on, which leaves doubles alone."""
    return torch.get_autocast_dtype(device) if dtype != torch.float64 and autocasts(device) else dtype


def gpu_refusal(call: Call, interpreted: bool | None = None) -> str | None:
    """Returns the reason why no GPU kernel serves a call's device or dtype, or None.

    Args:
        call: the call to serve.
        interpreted: whether the kernel runs in Triton's interpreter, on CPU tensors; None if it never can.
    """
    device, dtype = call.device, call.dtype
    if device.type == "hip":
        if interpreted is None:
            return "the GPU is not one of NVIDIA's"
        if device.capability not in (MI300.capability, RDNA3.capability):
            return "of AMD's GPUs the kernel is compiled for gfx942 and gfx1100 only"
    elif device.type != "cuda" and not (interpreted and device.type == "cpu"):
        way_out = "" if interpreted is None else " (or with TRITON_INTERPRET=1)"
        return f"the input is on {device.type}, and the kernel runs on a GPU{way_out}"
    if device.type == "cuda" and device.capability < OLDEST:
        return "the GPU's compute capability is {}.{}, and the kernels need 8.0".format(*device.capability)
    if dtype not in DTYPES:
        return f"the input is {dtype}, and the kernels take float32, bfloat16 and float16"
    return None


def padded_to_power(hidden: int) -> int:
    """Returns H padded to a power of two, at least the 16 rows of one MMA."""
    return max(16, 1 << (hidden - 1).bit_length())


@dataclass(frozen=True)
class TritonConfig:
    """The launch configuration of a call of the backend "triton"."""

    persistent: bool
    """W_hh is loaded once and stays on chip; else it is streamed: read in blocks at every step."""
    rows: int
    """Batch rows of one program."""
    block_hidden: int
    """Hidden units of one block: H padded to a power of two if `persistent`."""
    num_warps: int
    split: bool
    """fp32 products as three of fp16 (high and low parts of both factors, scaled)."""
    dot: Literal["ieee", "tf32", "tf32x3"]
    """`input_precision` of tl.dot where operands are fp32 and not split."""

    batched: bool = False
    """Products are a batch of sixteen hidden units each, if `persistent`: MMAs of one warp, on whatever GPU."""
    amd: bool = False
    """True if it is compiled for a GPU of AMD's, where `PTXAS_LIMIT` is unknown."""

    @property
    def form(self) -> str:
        """Name of the kernels that this configuration is for."""
        return "persistent" if self.persistent else "streamed"

    @property
    def accurate(self) -> bool:
        """True if products of fp32 numbers have fp32's accuracy."""
        return self.split or self.dot in ("tf32x3", "ieee")

    def constants(self) -> dict[str, Any]:
        """Returns the kernels' compile-time arguments that follow from the configuration."""
        if self.persistent:
            constants = {"HP": self.block_hidden, "N": self.rows, "SPLIT": self.split, "PRECISION": self.dot}
            return constants | {"BATCHED": self.batched}
        return {"BH": self.block_hidden, "N": self.rows, "PRECISION": self.dot}

    def options(self) -> dict[str, int | bool]:
        """Returns the compiler's options."""
        # Fusion of multiply and add is the default; triton 3.9 warns where it is not asked for by name.
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return options if self.amd else options | PTXAS_LIMIT


@functools.lru_cache
def choose_triton(call: Call, batch: int, newer_triton: bool = False) -> TritonConfig:
    """Returns the configuration of the backend "triton" for B rows; `newer_triton`: one newer than 3.6."""
    # Triton's interpreter takes the path of a large GPU.
    device = H100 if call.device.type == "cpu" else call.device
    wide, accurate = call.dtype == torch.float32, call.accurate
    padded = padded_to_power(call.hidden)
    if device.type == "hip":
        # Its matrix instructions take sixteen rows, and not everywhere TF32. With W_hh in registers gfx942 spills in
        # fp32 at H=128, and gfx1100, which keeps it twice, from H=16 on.
        if device.capability == MI300.capability and padded <= (64 if wide else ONE_PROCESSOR):
            return TritonConfig(True, 16, padded, padded // 16, split=wide, dot="ieee", amd=True)
        return TritonConfig(False, 16, min(32, padded), 8, split=False, dot="ieee", amd=True)
    # Eight rows a program spread a small batch over the most processors; sixteen halve the work per row once every
    # processor has a program. From compute capability 10 on, sixteen rows would go through tensor memory and spill.
    programs = 2 * -(-batch // 8)
    rows = 16 if programs > device.processors and device.capability < (10, 0) else 8
    if (padded == ONE_PROCESSOR and (wide or call.varlen)) or (padded == 16 and wide and call.varlen and not accurate):
        rows = 8  # sixteen spill on sm_80 or sm_90, under triton 3.6 or 3.9
    # Compiled for sm_80, sm_90 and sm_100: W_hh, whole or as two fp16 halves, plus at most three tiles of the state.
    needed = 3 * padded * padded * (4 if wide else 2) + 3 * padded * rows * 4
    if padded <= ONE_PROCESSOR and needed <= device.shared_memory:
        # Of the ways to fp32 only two 16-bit parts fit here: ieee (FMA) spills kilobytes at H=128, tf32x3 needs 400 KB.
        # fp16 rather than bf16 parts: scaled, they are ten times as accurate (1e-7 against 1e-6) at the same cost.
        # One warp for every 16 hidden units, the rows of one MMA, so that no warp repeats another's work.
        # Triton 3.6 multiplies eight rows with MMAs of one warp. Newer ones take wgmma, with a fence for each product,
        # and from compute capability 10 on tensor memory, with up to 52 barriers a step, but not for a batch. Both need
        # 64 hidden units.
        batched = newer_triton and rows == 8 and padded >= 64 and device.capability >= (9, 0)
        batched = batched and not (call.varlen and accurate and padded == ONE_PROCESSOR)  # 16 bytes spill on sm_90
        return TritonConfig(True, rows, padded, padded // 16, split=accurate, dot="tf32", batched=batched)
    # The largest blocks that spill on no architecture.
    if accurate:
        return TritonConfig(False, 16, min(32, padded), 8, split=False, dot="tf32x3")
    return TritonConfig(False, 16, min(64, padded), 8, split=False, dot="tf32")


@dataclass(frozen=True)
class ResidentConfig:
    """The launch configuration of a call of the backend "resident"."""

    rows: int
    """Batch rows of one program."""
    padded: int
    """H padded to a power of two."""
    split: bool
    """Both factors of the products as two fp16 parts."""

    form = ""

    @property
    def num_warps(self) -> int:
        """A warp for every 16 hidden units."""
        return self.padded // 16

    def constants(self) -> dict[str, Any]:
        """Returns the kernels' compile-time arguments that follow from the configuration."""
        return {"HP": self.padded, "N": self.rows, "SPLIT": self.split}

    def options(self) -> dict[str, int | bool]:
        """Returns the compiler's options."""
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        # Told nothing, ptxas has loads wait for one another: it stops near 170 registers at H=128 with 16-bit storage,
        # and near 100 with two parts below 64. With 16-bit storage below 64 the limit makes the forward step shorter
        # too, but the backward step longer.
        widened = self.padded == ONE_PROCESSOR or (self.split and self.padded < 64)
        return options | PTXAS_LIMIT if widened else options


@functools.lru_cache
def choose_resident(call: Call, batch: int) -> ResidentConfig:
    """Returns the configuration of the backend "resident" for B rows."""
    padded = padded_to_power(call.hidden)
    # The narrowest block spreads a small batch over the most processors, and its step is the shortest. Two parts of a
    # row take two of the MMA's eight columns.
    rows = 4 if call.accurate else 8
    # Once there are more programs than fit at once, twice the rows a program take less than twice the time a step,
    # where there are registers for it: at H=128 W_hh leaves too few but with 16-bit storage, and sequences of different
    # lengths take more. Below 64, many programs fit on a processor.
    at_once = call.device.processors * (128 // padded)
    registers = padded == 64 or (call.hidden == 128 and call.dtype != torch.float32)  # H=100 spills
    if 2 * -(-batch // rows) > at_once and registers and not call.varlen:
        rows *= 2
    return ResidentConfig(rows, padded, call.accurate)


@dataclass(frozen=True)
class CooperativeConfig:
    """The launch configuration of "cooperative"; a launch holds no more programs than the GPU has processors."""

    units: int
    """Hidden units of one program, S."""
    rows: int
    """Batch rows of one group, N."""
    chunk: int
    """Columns of W_hh in one product."""
    programs: int
    """Programs of one group: together they own all hidden units."""
    blocks: int
    """Blocks of batch rows in one launch; a larger batch takes several launches, one after another."""
    directions: int
    """Directions in one launch, 2 or 1."""
    split: bool
    """fp32 products as three of fp16 (high and low parts of both factors, scaled)."""
    joined: bool = False
    """The forward kernel's sums over warps take one trip through shared memory for all gates, with room for four."""
    max_polls: int = 1 << 22
    """Polls until a wait is given up: far more than any step takes; no program waits that long twice."""
    num_warps: int = 8

    form = ""

    @property
    def padded(self) -> int:
        """H padded to whole chunks."""
        return -(-self.programs * self.units // self.chunk) * self.chunk

    def constants(self) -> dict[str, Any]:
        """Returns the kernels' compile-time arguments that follow from the configuration."""
        return {"S": self.units, "N": self.rows, "CHUNK": self.chunk, "SPLIT": self.split, "MAX_POLLS": self.max_polls}

    def options(self) -> dict[str, int | bool]:
        """Returns the compiler's options."""
        # With one program a processor, all registers are the program's.
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return options | PTXAS_LIMIT | {"launch_cooperative_grid": True}

    def groups(self, batch: int) -> int:
        """Returns the number of groups in the largest launch of B rows."""
        return min(self.blocks, -(-batch // self.rows)) * self.directions

    def launches(self, batch: int) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
        """Yields the first batch row, the first direction and the grid of each launch that a call takes."""
        all_blocks = -(-batch // self.rows)
        for first_block in range(0, all_blocks, self.blocks):
            for first_d in range(0, 2, self.directions):
                blocks = min(self.blocks, all_blocks - first_block)
                yield first_block * self.rows, first_d, (self.programs, blocks, self.directions)


@functools.lru_cache
def choose_cooperative(call: Call, batch: int) -> CooperativeConfig:
    """Returns the cheapest of `cooperative_configs`, of which there must be one, for B rows."""

    def price(config: CooperativeConfig) -> tuple[int, int]:
        # A launch more is T steps more. Among equals, what a program reads at a step: its weights from shared memory,
        # and the state from L2, where a byte is taken as four times as dear, since all processors share its bandwidth.
        parts = 2 if config.split else 1
        weights = 3 * config.units * config.padded * 2 * parts
        return len(list(config.launches(batch))), weights + 4 * config.rows * config.padded * 2 * parts

    return min(cooperative_configs(call), key=price)


def cooperative_configs(call: Call) -> Iterator[CooperativeConfig]:
    """Yields the configurations whose programs all find room on the GPU at once, one on each processor."""
    hidden, device = call.hidden, call.device
    # Chunks of 128 where they pad H less. With chunks of 512, or with more units or rows, some kernels spill.
    chunk = 256 if 2 * -(-hidden // 256) == -(-hidden // 128) else 128
    for units in (32, 16):
        programs = -(-hidden // units)
        groups = device.processors // programs
        for rows in (16, 32):
            blocks, directions = max(1, groups // 2), min(2, groups)
            # With 32 of both, the sums of three gates at once spill.
            for joined in (units * rows < 1024, False):
                config = CooperativeConfig(units, rows, chunk, programs, blocks, directions, call.accurate, joined)
                if groups >= 1 and cooperative_shared_memory(config) <= device.shared_memory:
                    yield config
                    break


def cooperative_shared_memory(config: CooperativeConfig) -> int:
    """Returns the bytes that one program needs, as compiled for sm_80, sm_90 and sm_100, or a little more."""
    weights = 3 * config.units * config.padded * (4 if config.split else 2)
    # The forward kernel's sums over warps, or the tile of the shares that passes through.
    sums = config.num_warps * config.rows * config.units * 4 * (4 if config.joined else 1)
    return weights + max(sums, 64 * config.chunk)
