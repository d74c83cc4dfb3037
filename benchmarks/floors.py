"""What the device can do at best: copies, launches, and the parts of one time step that must follow one another.

A step of the recurrence at H = 128 with eight batch rows is 192 tensor-core products of 16 x 8 x 16 and 3,072
activations. Two kernels run exactly that, step after step, each step on the result of the one before, with everything
in registers: what a real step takes longer is memory, barriers and layout.
"""

from __future__ import annotations

import statistics

import torch
import triton
import triton.language as tl

from benchmarks.gpu_record import FLOOR_HIDDEN, FLOOR_ROWS, Row
from benchmarks.machine import Machine
from benchmarks.timing import Work

WARPS = 8
ELEMENTS = FLOOR_HIDDEN * FLOOR_ROWS
PROGRAMS = 16
"""The main workload's: two directions of eight blocks of eight batch rows."""
ROUNDS = 20


@triton.jit
def empty_kernel(out_ptr):
    pass


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def activation_kernel(
    out_ptr,  # (programs, ELEMENTS) fp32
    steps,
    ELEMENTS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    # The cell of the GRU with the state in place of the products.
    offs = tl.arange(0, ELEMENTS)
    i_r = offs * (1.0 / ELEMENTS)
    i_z = 0.5 - i_r
    h = 0.25 * i_r
    for _ in range(steps):
        r = _sigmoid(i_r + h, APPROXIMATE)
        z = _sigmoid(i_z + h, APPROXIMATE)
        n = 2.0 * _sigmoid(2.0 * (i_z + r * h), APPROXIMATE) - 1.0
        h = n + z * (h - n)
    tl.store(out_ptr + tl.program_id(0) * ELEMENTS + offs, h)


@triton.jit
def product_kernel(
    out_ptr,  # (programs, ELEMENTS) fp32
    steps,
    ELEMENTS: tl.constexpr,
    ASM: tl.constexpr,
):
    # An instruction of a warp's threads together, four accumulators each; the layout has four elements a thread.
    offs = tl.arange(0, ELEMENTS)
    i = offs * (1.0 / ELEMENTS)
    h = i
    for _ in range(steps):
        h = tl.inline_asm_elementwise(
            ASM, "=f,=f,=f,=f,f,f,f,f,f,f,f,f", [h, i], dtype=tl.float32, is_pure=False, pack=4
        )
    tl.store(out_ptr + tl.program_id(0) * ELEMENTS + offs, h)


def product_asm(mode: str) -> str:
    """PTX of one warp's share of a step's products: three gates, each a chain over H."""
    # Depth of one instruction, its types, two numbers 2^-11 and less as operands, and how many products stand for one.
    depth, types, weights, parts = {
        "fp32": (16, "f16", ("0x10001000", "0x0c000c00", "0x08000800"), 3),
        "tf32": (8, "tf32", ("0x3a000000", "0x39800000", "0x39000000"), 1),
        "bf16": (16, "bf16", ("0x3a003a00", "0x39803980", "0x39003900"), 1),
        "fp16": (16, "f16", ("0x10001000", "0x0c000c00", "0x08000800"), 1),
    }[mode]
    lines = ["{", ".reg .f32 c<12>;", ".reg .f32 s<4>;", ".reg .b32 w<3>;", ".reg .b32 b<2>;"]
    # The state as an operand; a real step exchanges it between the threads on the way.
    if types == "tf32":
        lines += ["cvt.rna.tf32.f32 b0, $4;", "cvt.rna.tf32.f32 b1, $6;"]
    else:
        lines += [f"cvt.rn.{types}x2.f32 b0, $5, $4;", f"cvt.rn.{types}x2.f32 b1, $7, $6;"]
    for gate, weight in enumerate(weights):
        lines.append(f"mov.b32 w{gate}, {weight};")
        lines += [f"mov.f32 c{4 * gate + k}, ${8 + k};" for k in range(4)]
    shape = f"m16n8k{depth}.row.col.f32.{types}.{types}.f32"
    for _ in range(parts * FLOOR_HIDDEN // depth):
        for gate in range(3):
            c = ", ".join(f"c{4 * gate + k}" for k in range(4))
            w = ", ".join([f"w{gate}"] * 4)
            lines.append(f"mma.sync.aligned.{shape} {{{c}}}, {{{w}}}, {{b0, b1}}, {{{c}}};")
    for k in range(4):
        lines += [f"add.f32 s{k}, c{k}, c{4 + k};", f"add.f32 s{k}, s{k}, c{8 + k};", f"mov.f32 ${k}, s{k};"]
    return "\n".join([*lines, "}"])


def fact(machine: Machine, rows: list[Row]) -> list[Row]:
    """Measures one fact, named as in the record."""
    row = rows[0]
    group, _, which = row["name"].rpartition("/")
    if group and not machine.has_ptx and which != "accurate":
        return [row | {"status": "not available", "message": "inline PTX needs a GPU"}]
    if group.endswith("mufu"):
        value = step_us(machine, activation_kernel, APPROXIMATE=which == "approximate")
    elif group.endswith("mma"):
        value = step_us(machine, product_kernel, ASM=product_asm(which))
    else:
        value = {"copy_gb_s": copy_gb_s, "launch_us": launch_us, "graph_launch_us": graph_launch_us}[which](machine)
    return [row | {"value": value, "status": "measured"}]


def copy_gb_s(machine: Machine) -> float:
    """Bytes read and written by a copy on the device, 10^9 a second."""
    # Many times any cache.
    size = 2**30 if machine.device.type == "cuda" else 2**20
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / (1e6 * median_ms(machine, "gpu_ms", lambda: target.copy_(source)))


def launch_us(machine: Machine) -> float:
    """What one launch of an empty Triton kernel takes by the wall when many follow one another."""
    count, work = launches(machine)
    return 1e3 * median_ms(machine, "eager_ms", work) / count


def graph_launch_us(machine: Machine) -> float:
    """The same inside a CUDA graph, on the device."""
    count, work = launches(machine)
    return 1e3 * median_ms(machine, "graph_ms", machine.capture(work)) / count


def launches(machine: Machine) -> tuple[int, Work]:
    """How many launches, and the launching."""
    count = 200 if machine.device.type == "cuda" else 2
    out = torch.empty(1, device=machine.device)

    def work() -> None:
        for _ in range(count):
            empty_kernel[(1,)](out)

    return count, work


def step_us(machine: Machine, kernel: triton.JITFunction, **constants: object) -> float:
    """One step of a chain of them, by the difference of two lengths, so that neither launch nor prologue counts."""
    short, long = (1_000, 11_000) if machine.device.type == "cuda" else (1, 3)
    out = torch.empty(PROGRAMS, ELEMENTS, device=machine.device)

    def chain(steps: int) -> Work:
        return lambda: kernel[(PROGRAMS,)](
            out, steps, ELEMENTS=ELEMENTS, num_warps=WARPS, enable_fp_fusion=True, **constants
        )

    few, many = (median_ms(machine, "gpu_ms", chain(steps)) for steps in (short, long))
    machine.finish()
    if not torch.isfinite(out).all():
        raise ArithmeticError("the chain left the finite numbers, so its time is of something else")
    return 1e3 * (many - few) / (long - short)


def median_ms(machine: Machine, figure: str, work: Work) -> float:
    """Median of a few rounds, after two that are not counted."""
    rounds = ROUNDS if machine.device.type == "cuda" else 3
    times = [machine.time_ms(figure, work, lead_ms=2.0) for _ in range(rounds + 2)]
    return statistics.median(times[2:])
