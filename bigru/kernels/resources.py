"""Compiles every shipped kernel and measures the machine code, with no GPU needed: `python -m bigru.kernels.resources`.

Compiles each configuration that the registry's kernels choose and prints registers, spills, shared memory and the size
of one time step. Exits with 1, naming the rows, if one does not compile, spills, or needs more shared memory than there
is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from bigru.kernels import registry
from bigru.kernels.backends import PUBLIC
from bigru.kernels.cell import INTERPRETED, TRITON_VERSION
from bigru.kernels.collect import Wanted, collect_kernel
from bigru.kernels.config import A100, B200, H100, MI300, RDNA3, Call, CooperativeConfig, ResidentConfig, TritonConfig
from bigru.kernels.gather import POINTERS, Layout, gather_kernel, lay_out
from bigru.kernels.mend import CONFIG as MENDING
from bigru.kernels.mend import gru_mend_kernel

DEVICES = {"sm_80": A100, "sm_90": H100, "sm_100": B200, "gfx942": MI300, "gfx1100": RDNA3}
MODES = ((torch.float32, "fp32"), (torch.float32, "tf32"), (torch.bfloat16, "fp32"), (torch.float16, "fp32"))
"""Storage and precision."""
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

AROUND: dict[str, tuple[Any, dict[str, str]]] = {
    "mend": (gru_mend_kernel, {}),
    "gather": (gather_kernel, {}),
    "collect": (collect_kernel, {"sums_ptr": "*fp32"}),
}
"""The kernels that run before or after every other, as `Kernel.functions` has them."""

BUDGETS = {
    # Without gates saved, forward: 16-bit operands and TF32's accuracy; fp32's as much again for a quarter of the rows.
    ("resident", "forward", False): {"bf16": (160, 2), "fp16": (160, 2), "tf32": (200, 2), "fp32": (230, 2)},
    ("resident", "forward", True): {"bf16": (230, 2), "fp16": (230, 2), "tf32": (230, 2), "fp32": (230, 2)},
    ("resident", "backward", True): {"bf16": (265, 1), "fp16": (265, 1), "tf32": (310, 1), "fp32": (260, 2)},
    ("triton", "forward", True): {"bf16": (340, 2), "fp16": (340, 2), "tf32": (400, 2), "fp32": (470, 2)},
    ("triton", "backward", True): {"bf16": (320, 6), "fp16": (320, 6), "tf32": (570, 2), "fp32": (540, 9)},
}
"""Most instructions and barriers of one step by kernel, direction and whether gates are saved, on sm_90 with the
narrowest block."""
BUDGETED_HIDDEN = 128
BUDGETED_TRITON = (3, 6)
"""The version that the budgets are for; newer ones may take 15 % more instructions."""
BARRIERS_OF_NEWER = {("forward", "fp32"): 4, ("backward", "fp32"): 14, ("backward", "tf32"): 6}
"""Barriers of "triton" under a newer version, by direction and mode, where there are more: two for each change of the
state's or a gradient's layout to a batched product's operand, all through one place in shared memory. Operands of
products that are no batch have places of their own, but such products of newer versions go through wgmma."""

HEADERS = (
    *("arch", "kernel", "H", "storage", "precision", "N", "warps", "registers", "spilled B", "shared B", "limit B"),
    *("step instr.", "barriers", "budget", "problem"),
)
FIELDS = (
    *("arch", "name", "hidden", "storage", "mode", "rows", "num_warps", "registers", "spilled", "shared", "limit"),
    *("instructions", "barriers", "budget", "problem"),
)
"""The table's columns, as `as_record` calls them."""
FOOTNOTES = """\
N: batch rows of one program. registers: of one thread; spilled: its stack. shared: of one program.
step: instructions and barriers of the largest loop in the machine code, one time step; of a streamed kernel this is the
body of the time loop as it is written, with each inner loop over blocks counted once. Sizes, not times.
Forward kernels as in training, with bias and gates saved, unless they say "inference". budget: most instructions and
barriers a step. B and T are any numbers, pointers are aligned. Of AMD's code (gfx),
which has never run, no step is read."""


@dataclass(frozen=True)
class Around:
    """The configuration of a kernel before or after the recurrence, with what is asked of the recurrence's."""

    own: Layout | Wanted
    rows: int = 1
    num_warps: int = 4
    form: str = ""
    split: bool = False

    def constants(self) -> dict[str, Any]:
        """Returns the kernel's compile-time arguments."""
        return self.own.constants()

    def options(self) -> dict[str, Any]:
        """Returns the compiler's options."""
        return self.own.options()


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration."""

    arch: str
    kernel: str
    """Its name in the registry."""
    direction: str
    hidden: int
    storage: str
    precision: str
    config: TritonConfig | ResidentConfig | CooperativeConfig | Around
    save: bool = True
    """True if the gates are saved, as in training."""
    varlen: bool = False
    """True if the sequences have different lengths."""

    @property
    def name(self) -> str:
        """The kernel as the table names it."""
        form = f" {self.config.form}" if self.config.form else ""
        return f"{self.direction} {self.kernel}{form}{', varlen' * self.varlen}{', inference' * (not self.save)}"

    @property
    def mode(self) -> str:
        """Precision of fp32 storage, else the storage."""
        return self.precision if self.storage == "fp32" else self.storage

    def __str__(self) -> str:
        names = f"{self.arch} {self.name}, H={self.hidden}, {self.storage} storage, precision {self.precision}"
        return f"{names}, N={self.config.rows}, {self.config.num_warps} warps"


@dataclass(frozen=True)
class Usage:
    """The resources that a compiled case needs; sizes in bytes."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    instructions: int = 0
    barriers: int = 0
    error: str | None = None


def main(
    argv: Sequence[str] | None = None,
    *,
    interpreted: bool = INTERPRETED,
    compile_all: Callable[[Sequence[Case], int], list[Usage]] | None = None,
) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; by default the process's.
        interpreted: whether the kernels are defined for Triton's interpreter, in which nothing is compiled.
        compile_all: what measures the cases in so many processes.

    Returns:
        The exit code: 0, 1 a row has a problem, 2 nothing can be compiled.
    """
    parser = argparse.ArgumentParser(prog="python -m bigru.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=DEVICES, help="only this architecture; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if interpreted:
        print("bigru.kernels.resources: TRITON_INTERPRET is set, so nothing is compiled; unset it", file=sys.stderr)
        return 2
    header = {"triton": triton.__version__, "ptxas": ptxas_versions(), "date": date.today().isoformat()}
    cases = list(shipped(arguments.arch or DEVICES))
    usages = (compile_all or measure_all)(cases, arguments.jobs)
    print(f"triton {header['triton']}, ptxas {header['ptxas']}, {header['date']}; {len(cases)} kernels\n")
    rows = [as_record(*pair) for pair in zip(cases, usages, strict=True)]
    print(*table(rows), f"\n{FOOTNOTES}", sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(header | {"rows": rows}, indent=1, default=str) + "\n", encoding="utf-8")
    return verdict(cases, usages)


def shipped(archs: Iterable[str]) -> list[Case]:
    """Returns every compiled kernel in every configuration that it takes on these architectures, each once."""
    cases = [
        case
        for arch in archs
        for kernel in PUBLIC
        for hidden in registry.get(kernel).widths
        for dtype, precision in MODES
        for case in cases_of(arch, kernel, hidden, dtype, precision)
    ]
    return [*dict.fromkeys(cases), *(case for arch in archs for case in around(arch))]


def around(arch: str) -> Iterator[Case]:
    """Yields the kernels that run before or after every other, which take each hidden size alike, at one."""
    for varlen in (False, True):
        yield Case(arch, "triton", "mend", 128, "fp32", "fp32", MENDING, varlen=varlen)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        layout = lay_out(128, 84, True, 64, (dtype,) * 10)
        yield Case(arch, "triton", "gather", 128, name, "fp32", Around(layout))
        yield Case(arch, "triton", "collect", 128, name, "fp32", Around(Wanted(True, True)))


def cases_of(arch: str, name: str, hidden: int, dtype: torch.dtype, precision: str) -> Iterator[Case]:
    """Yields what one kernel compiles for one width and mode."""
    kernel, call = registry.get(name), Call(DEVICES[arch], dtype, hidden, precision)
    calls = [call, replace(call, varlen=True)] if hidden in kernel.varlen_widths else [call]
    for call, batch in itertools.product(calls, kernel.batches):
        if kernel.refusal(call) is not None:
            continue
        config = kernel.choose(call, batch)
        for direction in kernel.functions(config):
            case = Case(arch, name, direction, hidden, SHORT_NAMES[dtype], precision, config, varlen=call.varlen)
            yield case
            if hidden == BUDGETED_HIDDEN and (name, direction, False) in BUDGETS and not call.varlen:
                yield replace(case, save=False)


def measure_all(cases: Sequence[Case], jobs: int) -> list[Usage]:
    """Measures the cases in this many processes, and counts them on a terminal."""
    usages = []
    # Spawned, not forked: torch has threads by now.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        for usage in executor.map(measure, cases):
            usages.append(usage)
            if sys.stderr.isatty():
                print(f"\r{len(usages)} of {len(cases)} kernels", end="", file=sys.stderr, flush=True)
    return usages


def measure(case: Case) -> Usage:
    """Compiles a case and reads its machine code; a failure to compile is the finding, not an error."""
    try:
        compiled = compile_case(case)
        if "amdgcn" in compiled.asm:
            return Usage(*read_amd_usage(compiled.asm["amdgcn"]), compiled.metadata.shared)
        text = dump(compiled.asm["cubin"])
        registers, spilled = read_usage(text)
        instructions, barriers = read_step(text)
        steps = registry.get(case.kernel).steps_a_turn
        return Usage(registers, spilled, compiled.metadata.shared, -(-instructions // steps), -(-barriers // steps))
    except Exception as error:
        return Usage(error=f"{type(error).__name__}: {error}".splitlines()[0])


def compile_case(case: Case) -> Any:
    """Compiles as a launch would, for a GPU that need not be there."""
    config = case.config
    functions = AROUND if case.direction in AROUND else registry.get(case.kernel).functions(config)
    function, types = functions[case.direction]
    accurate = isinstance(config, TritonConfig) and config.accurate
    values = {"H": case.hidden, "HAS_BIAS": True, "SAVE": case.save, "ACCURATE": accurate, "WARPS": config.num_warps}
    values |= {"JOINED": isinstance(config, CooperativeConfig) and config.joined}
    values |= config.constants()
    operand = "*fp16" if case.storage == "fp32" else f"*{case.storage}"
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = values[parameter.name]
        elif parameter.name in ("varlen_ptr", "h_prev_ptr") and not case.varlen and case.direction != "collect":
            signature[parameter.name] = "constexpr"
            constants[(i,)] = None
        elif parameter.name.endswith("_ptr") or parameter.name in POINTERS:
            kind = "*i64" if parameter.name == "varlen_ptr" else types.get(parameter.name, f"*{case.storage}")
            signature[parameter.name] = operand if kind == "operand" else kind
            if not parameter.do_not_specialize_on_alignment:
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "i32"
    build = GluonASTSource if isinstance(function, GluonJITFunction) else ASTSource
    source = build(function, signature, constants, aligned)
    if case.arch.startswith("gfx"):
        target = GPUTarget("hip", case.arch, 64 if case.arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=config.options())


def dump(cubin: bytes) -> str:
    """Returns a compiled kernel's machine code and resource usage, as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_usage(text: str) -> tuple[int, int]:
    """Returns registers and stack bytes of a thread, from what cuobjdump says."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise ValueError("cuobjdump prints no resource usage")
    return int(match[1]), int(match[2])


def read_amd_usage(text: str) -> tuple[int, int]:
    """Returns vector registers of a thread and the bytes that it spills, from an AMD kernel's assembly."""
    found = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    spilled = 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
    return found["vgpr_count"], max(spilled, found["private_segment_fixed_size"])


def read_step(text: str) -> tuple[int, int]:
    """Returns instructions and barriers of the largest loop, i.e. of what the longest branch back spans."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]
    # Behind the last exit lie waits that were moved out of the loop; they too branch back, into its middle.
    end = max((at for at, instruction in code if "EXIT" in instruction), default=0)
    longest: list[str] = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*0x([0-9a-f]+)", instruction)
        if branch and address < end and int(branch[1], 16) < address:
            body = [other for at, other in code if int(branch[1], 16) <= at <= address]
            longest = max(longest, body, key=len)
    return len(longest), sum(bool(re.search(r"\bBAR\.", instruction)) for instruction in longest)


def ptxas_versions() -> str:
    """Returns the versions of the assemblers that Triton carries, the one for newer architectures last."""
    tools = (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell)
    return " and ".join(dict.fromkeys(tool.version for tool in tools))


def problem(case: Case, usage: Usage, version: tuple[int, ...] = TRITON_VERSION) -> str | None:
    """Returns the reason why a case cannot be shipped, or None."""
    if usage.error is not None:
        return f"does not compile: {usage.error}"
    if usage.spilled:
        return f"spills {usage.spilled} bytes a thread"
    limit = DEVICES[case.arch].shared_memory
    if usage.shared > limit:
        return f"needs {usage.shared} bytes of shared memory, {limit} there are"
    if (most := budget(case, version)) and (usage.instructions > most[0] or usage.barriers > most[1]):
        found = f"{usage.instructions} instructions and {usage.barriers} barriers"
        return f"takes {found} a step, {most[0]} and {most[1]} are allowed"
    return None


def budget(case: Case, version: tuple[int, ...] = TRITON_VERSION) -> tuple[int, int] | None:
    """Returns the most instructions and barriers of one step under a triton, for the cases that have a budget."""
    of_kernel = BUDGETS.get((case.kernel, case.direction, case.save))
    if of_kernel is None:
        return None
    narrowest = 4 if case.config.split and case.kernel == "resident" else 8
    if (case.arch, case.hidden, case.config.rows, case.varlen) != ("sm_90", BUDGETED_HIDDEN, narrowest, False):
        return None
    instructions, barriers = of_kernel[case.mode]
    if version <= BUDGETED_TRITON:
        return instructions, barriers
    if case.kernel == "triton":
        barriers = BARRIERS_OF_NEWER.get((case.direction, case.mode), barriers)
    return int(instructions * 1.15), barriers


def verdict(cases: Sequence[Case], usages: Sequence[Usage]) -> int:
    """Names the cases with a problem; returns the exit code."""
    found = [(case, reason) for case, usage in zip(cases, usages, strict=True) if (reason := problem(case, usage))]
    for case, reason in found:
        print(f"{case}: {reason}", file=sys.stderr)
    return 1 if found else 0


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table."""
    cells = [[*HEADERS], *([_cell(row[name]) for name in FIELDS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else str(value)


def as_record(case: Case, usage: Usage) -> dict[str, Any]:
    """Returns everything known of a case."""
    more = {"name": case.name, "mode": case.mode, "rows": case.config.rows, "num_warps": case.config.num_warps}
    more |= {"limit": DEVICES[case.arch].shared_memory, "budget": budget(case), "problem": problem(case, usage)}
    return asdict(case) | asdict(usage) | more


if __name__ == "__main__":
    sys.exit(main())
