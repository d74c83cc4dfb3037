"""What every shipped kernel compiles to, with no GPU needed: `python -m bigru.kernels.resources`.

Compiles each configuration that `launch.choose` returns and prints registers, spills, shared memory and the size of one
time step. Exits with 1, naming the rows, if one does not compile, spills, or needs more shared memory than there is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from bigru.kernels import blocked, cooperative, launch, portable, resident

DEVICES = {"sm_80": launch.A100, "sm_90": launch.H100, "sm_100": launch.B200}
HIDDEN = (16, 32, 64, 100, 128, 200)
"""Each padded size, and two that need padding."""
BATCHES = (1, 4096)
"""Fewer programs than processors, and more."""
MODES: tuple[tuple[torch.dtype, launch.Precision], ...] = (
    (torch.float32, "fp32"),
    (torch.float32, "tf32"),
    (torch.bfloat16, "fp32"),
    (torch.float16, "fp32"),
)
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

WHOLE = {"forward": "gru_forward_kernel", "backward": "gru_backward_kernel"}
BLOCKED = {"forward blocked": "gru_forward_blocked_kernel", "backward blocked": "gru_backward_blocked_kernel"}
RESIDENT = {"forward resident": "gru_forward_resident_kernel", "backward resident": "gru_backward_resident_kernel"}
COOPERATIVE = {
    "forward cooperative": "gru_forward_cooperative_kernel",
    "backward cooperative": "gru_backward_cooperative_kernel",
}
PACKED_HIDDEN = (16, 128, 200)
"""Of these, what the kernels for packed sequences are compiled for: least and most on chip, and one read in blocks."""
SPLIT_HIDDEN = (192, 256, 512, 1024)
"""Hidden sizes of the cooperative kernels: with padding and without, few programs and many."""
BUFFERS = {
    "gru_forward_blocked_kernel": {"state_ptr": "*fp32"},
    "gru_backward_blocked_kernel": {"dh_ptr": "*fp32"},
    "gru_forward_cooperative_kernel": {"arrivals_ptr": "*i64"},
    "gru_backward_cooperative_kernel": {"shares_ptr": "*fp32", "arrivals_ptr": "*i64"},
}
"""What is not of the storage's type."""

BUDGETS = {
    # Without gates saved, forward: 16-bit operands and TF32's accuracy; fp32's as much again for a quarter of the rows.
    ("forward resident", False): {"bf16": (160, 2), "fp16": (160, 2), "tf32": (200, 2), "fp32": (230, 2)},
    ("forward resident", True): {"bf16": (230, 2), "fp16": (230, 2), "tf32": (230, 2), "fp32": (230, 2)},
    ("backward resident", True): {"bf16": (275, 4), "fp16": (275, 4), "tf32": (345, 4), "fp32": (345, 4)},
}
"""Most instructions and barriers of one step of the resident kernels, on sm_90 with the narrowest block."""
BUDGETED_HIDDEN = 128
BUDGETED_TRITON = (3, 6)
"""The version that the budgets are for; newer ones may take 15 % more instructions."""

HEADERS = (
    "arch", "kernel", "H", "storage", "precision", "N", "warps", "registers", "spilled B", "shared B", "limit B",
    "step instr.", "barriers", "budget",
)  # fmt: skip
FOOTNOTES = """\
N: batch rows of one program. registers: of one thread; spilled: its stack. shared: of one program.
step: instructions and barriers of the largest loop in the machine code, one time step; of a blocked kernel this is the
body of the time loop as it is written, with each inner loop over blocks counted once. Sizes, not times.
Forward kernels as in training, with bias and gates saved, unless they say "inference". budget: most instructions and
barriers a step. B and T are any numbers, pointers are aligned."""


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    arch: str
    kernel: str
    hidden: int
    storage: str
    precision: str
    config: launch.LaunchConfig | launch.ResidentConfig | cooperative.CooperativeConfig
    save: bool = True
    """Whether the gates are saved, as in training."""
    packed: bool = False
    """Whether the batch is a PackedSequence, which the portable kernels take."""

    @property
    def name(self) -> str:
        """The kernel as the table names it."""
        return self.kernel + (", packed" if self.packed else "") + (", inference" if not self.save else "")

    @property
    def rows(self) -> int:
        """Batch rows of one program."""
        config = self.config
        return config.rows if isinstance(config, cooperative.CooperativeConfig) else config.block_batch

    @property
    def mode(self) -> str:
        """Precision of fp32 storage, else the storage."""
        return self.precision if self.storage == "fp32" else self.storage

    def __str__(self) -> str:
        names = f"{self.arch} {self.name}, H={self.hidden}, {self.storage} storage, precision {self.precision}"
        return f"{names}, N={self.rows}, {self.config.options()['num_warps']} warps"


@dataclass(frozen=True)
class Usage:
    """What a case compiles to; sizes in bytes."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: int = 0
    barriers: int = 0
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 a row has a problem, 2 nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m bigru.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=DEVICES, help="only this architecture; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if launch.interpreted():
        print("bigru.kernels.resources: TRITON_INTERPRET is set, so nothing is compiled; unset it", file=sys.stderr)
        return 2
    header = {"triton": triton.__version__, "ptxas": ptxas_versions(), "date": date.today().isoformat()}
    cases = list(shipped(arguments.arch or DEVICES))
    usages = compile_all(cases, arguments.jobs)
    print(f"triton {header['triton']}, ptxas {header['ptxas']}, {header['date']}; {len(cases)} kernels\n")
    print(tabulate([table_row(*pair) for pair in zip(cases, usages, strict=True)], HEADERS))
    print(f"\n{FOOTNOTES}")
    if arguments.json:
        rows = [as_record(*pair) for pair in zip(cases, usages, strict=True)]
        arguments.json.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return verdict(cases, usages)


def shipped(archs: Sequence[str] | dict[str, Any]) -> Iterator[Case]:
    """Every kernel and configuration that `launch` takes on these architectures, each once."""
    yield from dict.fromkeys(
        case
        for arch in archs
        for hidden in HIDDEN
        for dtype, precision in MODES
        for batch in BATCHES
        for case in cases_of(arch, hidden, dtype, precision, batch)
    )
    yield from dict.fromkeys(
        Case(arch, kernel, hidden, SHORT_NAMES[dtype], precision, config)
        for arch in archs
        for hidden in SPLIT_HIDDEN
        for dtype, precision in MODES
        if launch.refusal("cooperative", hidden, dtype, precision, DEVICES[arch]) is None
        for config in [cooperative.choose_cooperative(hidden, dtype, precision, 64, DEVICES[arch])]
        for kernel in COOPERATIVE
    )


def cases_of(arch: str, hidden: int, dtype: torch.dtype, precision: launch.Precision, batch: int) -> Iterator[Case]:
    """What could serve one call."""
    config = launch.choose(hidden, dtype, precision, batch, DEVICES[arch])
    for kernel in WHOLE if config.whole else BLOCKED:
        case = Case(arch, kernel, hidden, SHORT_NAMES[dtype], precision, config)
        yield case
        if hidden in PACKED_HIDDEN:
            yield replace(case, packed=True)
    if launch.refusal("resident", hidden, dtype, precision, DEVICES[arch]) is None:
        narrow = launch.choose_resident(hidden, dtype, precision, batch, DEVICES[arch])
        for kernel in RESIDENT:
            yield Case(arch, kernel, hidden, SHORT_NAMES[dtype], precision, narrow)
        if hidden == BUDGETED_HIDDEN:
            yield Case(arch, "forward resident", hidden, SHORT_NAMES[dtype], precision, narrow, save=False)


def compile_all(cases: Sequence[Case], jobs: int) -> list[Usage]:
    """Measures the cases in this many processes, with a bar on a terminal."""
    # Spawned, not forked: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as executor:
        return list(tqdm(executor.map(measure, cases), total=len(cases), disable=None, unit="kernel"))


def measure(case: Case) -> Usage:
    """Compiles a case and reads its machine code; a failure to compile is the finding, not an error."""
    try:
        compiled = compile_case(case)
        text = dump(compiled.asm["cubin"])
        registers, spilled = read_usage(text)
        instructions, barriers = read_step(text)
        # The resident kernels take two steps at every turn of their loop.
        steps = 2 if case.kernel in RESIDENT else 1
        return Usage(registers, spilled, compiled.metadata.shared, -(-instructions // steps), -(-barriers // steps))
    except Exception as error:
        return Usage(error=f"{type(error).__name__}: {error}".splitlines()[0])


def compile_case(case: Case) -> Any:
    """Compiles as a launch would, for a GPU that need not be there."""
    name = (WHOLE | BLOCKED | RESIDENT | COOPERATIVE)[case.kernel]
    config, accurate = case.config, case.storage == "fp32" and case.precision == "fp32"
    values: dict[str, Any] = {
        "H": case.hidden, "N": case.rows, "HAS_BIAS": True, "SAVE": case.save, "SPLIT": config.split,
        "ACCURATE": accurate,
    }  # fmt: skip
    build, types = ASTSource, {"packing_ptr": "*i64"} | BUFFERS.get(name, {})
    if isinstance(config, launch.ResidentConfig):
        kernel, build = getattr(resident, name), GluonASTSource
        values |= {"HP": config.padded}
    elif isinstance(config, cooperative.CooperativeConfig):
        kernel = getattr(cooperative, name)
        values |= {"S": config.units, "CHUNK": config.chunk, "WARPS": config.num_warps, "MAX_POLLS": config.max_polls}
        types.setdefault("state_ptr", "*fp16" if case.storage == "fp32" else f"*{case.storage}")
    else:
        kernel = getattr(portable if config.whole else blocked, name)
        values |= {"HP": config.block_hidden, "BH": config.block_hidden, "PRECISION": config.dot}
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = values[parameter.name]
        elif parameter.name in ("packing_ptr", "before_ptr") and not case.packed:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = None
        elif parameter.name.endswith("_ptr"):
            signature[parameter.name] = types.get(parameter.name, f"*{case.storage}")
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    source = build(kernel, signature, constants, aligned)
    options = config.options(case.packed) if isinstance(config, launch.LaunchConfig) else config.options()
    return triton.compile(source, target=target, options=options)


def dump(cubin: bytes) -> str:
    """What cuobjdump says of a compiled kernel: its machine code and its resource usage."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from what cuobjdump says."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise ValueError("cuobjdump prints no resource usage")
    return int(match[1]), int(match[2])


def read_step(text: str) -> tuple[int, int]:
    """Instructions and barriers of the largest loop, i.e. of what the longest branch back spans."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]
    # Behind the last exit lie waits that were moved out of the loop; they too branch back, into its middle.
    end = max((at for at, instruction in code if "EXIT" in instruction), default=0)
    longest: list[str] = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
        if branch and address < end and int(branch[1], 16) < address:
            body = [other for at, other in code if int(branch[1], 16) <= at <= address]
            longest = max(longest, body, key=len)
    return len(longest), sum("BAR." in instruction for instruction in longest)


def ptxas_versions() -> str:
    """Versions of the assemblers that Triton carries, the one for newer architectures last."""
    tools = (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell)
    return " and ".join(dict.fromkeys(tool.version for tool in tools))


def problem(case: Case, usage: Usage) -> str | None:
    """What keeps a case from being shipped, or None."""
    if usage.error is not None:
        return f"does not compile: {usage.error}"
    if usage.spilled:
        return f"spills {usage.spilled} bytes a thread"
    limit = DEVICES[case.arch].shared_memory
    if usage.shared > limit:
        return f"needs {usage.shared} bytes of shared memory, {limit} there are"
    if (most := budget(case)) and (usage.instructions > most[0] or usage.barriers > most[1]):
        found = f"{usage.instructions} instructions and {usage.barriers} barriers"
        return f"takes {found} a step, {most[0]} and {most[1]} are allowed"
    return None


def budget(case: Case) -> tuple[int, int] | None:
    """Most instructions and barriers of one step, for the cases that have a budget."""
    narrowest = 4 if case.config.split else 8
    where = case.arch, case.hidden, case.rows
    if where != ("sm_90", BUDGETED_HIDDEN, narrowest) or case.kernel not in RESIDENT:
        return None
    instructions, barriers = BUDGETS[case.kernel, case.save][case.mode]
    newer = tuple(int(part) for part in triton.__version__.split(".")[:2]) > BUDGETED_TRITON
    return int(instructions * (1.15 if newer else 1)), barriers


def verdict(cases: Sequence[Case], usages: Sequence[Usage]) -> int:
    """Names the cases with a problem; returns the exit code."""
    found = [(case, reason) for case, usage in zip(cases, usages, strict=True) if (reason := problem(case, usage))]
    for case, reason in found:
        print(f"{case}: {reason}", file=sys.stderr)
    return 1 if found else 0


def table_row(case: Case, usage: Usage) -> tuple[Any, ...]:
    """A row under `HEADERS`."""
    precision = case.precision if case.storage == "fp32" else "-"
    limit = DEVICES[case.arch].shared_memory
    sizes = usage.registers, usage.spilled, usage.shared, limit, usage.instructions, usage.barriers
    most = budget(case)
    return (
        case.arch, case.name, case.hidden, case.storage, precision, case.rows, case.config.options()["num_warps"],
        *(("error",) * len(sizes) if usage.error else sizes), f"{most[0]}, {most[1]}" if most else "-",
    )  # fmt: skip


def as_record(case: Case, usage: Usage) -> dict[str, Any]:
    """A row with everything known of it, for the JSON file."""
    more = {"name": case.name, "num_warps": case.config.options()["num_warps"]}
    more |= {"limit": DEVICES[case.arch].shared_memory, "budget": budget(case), "problem": problem(case, usage)}
    return asdict(case) | asdict(usage) | more


if __name__ == "__main__":
    sys.exit(main())
