"""What `bigru.prove` does: the cases, the jobs in a worker process, the record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bigru.kernels import proven, registry
from bigru.kernels.backends import KERNELS
from bigru.kernels.config import describe
from bigru.kernels.record import MODES, NN_GRU, Check, Record, RecordError, Row, read_record
from bigru.proof import checks, machine
from bigru.proof.pool import JobFailed, JobLate, Worker
from bigru.proof.workloads import PRECISIONS, Case

START_S = 180.0
"""For the first import of torch and CUDA on a cold disk."""
JOB_S = 60.0
"""Longest that a check or a timing may take, most of it compilation."""
COLUMNS = 100
"""Width of what is printed."""
ROW_S = 0.1
"""For the rounds of one row."""
GRID = {"hidden": (128, 256, 64, 512), "batch": (64, 1, 256), "steps": (60, 10)}
CPU_GRID = {"hidden": (128, 32, 256), "batch": (64, 8, 1), "steps": (60, 10, 2)}
"""Sizes, the most usual first, of a GPU and of a CPU: what the seconds do not reach stays unproven."""


def grid(
    hidden: Sequence[int], batch: Sequence[int], steps: Sequence[int], precisions: Sequence[str]
) -> Iterator[Case]:
    """Yields the cases of the sizes, the most valuable first."""
    for group, length in itertools.product(("layer", "ragged"), steps):
        for precision, size, rows in itertools.product(precisions, hidden, batch):
            yield Case(group, rows, length, size, input=size, layers=1, precision=precision)


def candidates(device_type: str) -> list[str]:
    """Returns the kernels that "auto" may take on a type of device."""
    return [name for name, entry in KERNELS.items() if entry.auto == device_type]


def describe_here(device: str) -> tuple[dict[str, object], dict[str, str | None], str]:
    """Returns machine and versions of a record, and where it is kept: asked in the worker, as all that touches CUDA."""
    here = describe(torch.device(device))
    about, versions = proven.keys(here)
    found = machine.describe_machine(torch.device(device)), machine.describe_versions()
    return found[0] | about, found[1] | versions, str(proven.proof_path(here))


def check(name: str, kernel: str, precision: str, device: str, hidden: Sequence[int]) -> Check:
    """Checks a kernel in a precision, in the worker."""
    mode = PRECISIONS[precision]
    faults = list(checks.faults(registry.get(kernel), mode.dtype, mode.precision, torch.device(device), hidden))
    return Check(name, kernel, "failed" if faults else "passed", "; ".join(faults)[:1000])


def time_rows(case: Case, kernel: str, device: str, threads: int) -> list[Row]:
    """Times a kernel at a case beside ATen's GRU, in the worker."""
    if device == "cpu":
        torch.set_num_threads(threads)
    clocks = machine.WALL if device == "cpu" else {name: machine.GPU[name] for name in proven.CLOCKS}
    return machine.measure(case, kernel, torch.device(device), ROW_S, clocks=clocks)


def run(
    record: Record,
    cases: Sequence[Case],
    kernels: Sequence[str],
    device: str,
    threads: int,
    worker: Worker,
    left: Callable[[], float],
    hidden: Sequence[int] = checks.HIDDEN,
) -> None:
    """Checks the kernels and times those that are right; what there is no time for is left out, and so unproven.

    Args:
        record: takes what is found.
        cases: in their order.
        kernels: by name.
        device: "cuda" or "cpu".
        threads: of a CPU.
        worker: runs the jobs, each of which may crash or hang.
        left: returns the seconds that are left.
        hidden: sizes of the checks.
    """

    def limit() -> float:
        return min(JOB_S, left())

    for kernel, precision in itertools.product(kernels, dict.fromkeys(case.precision for case in cases)):
        name = f"against fp64, {precision}"
        try:
            found = worker.run(limit(), check, name, kernel, precision, device, hidden)
        except JobFailed as why:
            found = Check(name, kernel, "failed", str(why))
        except JobLate as why:
            found = Check(name, kernel, "not available", str(why))
        record.checks.append(found)
        print(f"{kernel:12} {name}: {found.status} {found.message}"[:COLUMNS])
    right = {(found.candidate, found.name) for found in record.checks if found.status == "passed"}
    for case, kernel in itertools.product(cases, kernels):
        if (kernel, f"against fp64, {case.precision}") not in right:
            continue
        try:
            rows = worker.run(limit(), time_rows, case, kernel, device, threads)
        except JobFailed as why:
            about = vars(case) | {"candidate": kernel, "rival": NN_GRU, "threads": threads if device == "cpu" else None}
            rows = [Row(**about, mode=mode, status="failed", message=str(why)) for mode in MODES]
        except JobLate:
            record.complete = False
            continue
        record.rows += [row for row in rows if row.status != "refused"]
        if line := table_line(case, kernel, rows):
            print(line)


def table_line(case: Case, kernel: str, rows: Sequence[Row]) -> str:
    """Returns a line: times as fast as ATen's GRU by the slowest clock, with the quartiles."""
    where = f"{case.group:6} {case.precision:4} H={case.hidden:<4} B={case.batch:<4} T={case.steps:<4} {kernel:11}"
    measured = {}
    for row in sorted((row for row in rows if row.status == "measured"), key=lambda row: -row.ratio):
        measured[row.mode] = f"{row.mode} {row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})"
    failed = [row.message for row in rows if row.status == "failed"]
    figures = failed[0] if failed else "  ".join(measured[mode] for mode in sorted(measured))
    return f"{where} {figures}"[:COLUMNS] if figures else ""


def prove_here(
    command: str,
    sizes: Mapping[str, Sequence[int]],
    precisions: Sequence[str] | None,
    threads: int | None,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Proves the kernels on this machine; returns the command's exit code: 0, 1 where a kernel is wrong."""
    end, device, worker = now() + seconds, this_device().type, Worker()
    default, usual = (GRID, ["fp32", "bf16"]) if device == "cuda" else (CPU_GRID, ["fp32"])
    cases = list(grid(**{**default, **sizes}, precisions=precisions or usual))
    try:
        about, versions, place = worker.run(START_S, describe_here, device)
        record, path = Record("proof", command, about, versions), Path(place)
        run(record, cases, candidates(device), device, threads or torch.get_num_threads(), worker, lambda: end - now())
    finally:
        worker.close()
    record.seconds = round(seconds - (end - now()), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with_earlier(record, path).write(path)
    print(f"times as fast as ATen's GRU, median and quartiles; {record.seconds:.0f} s, {path}")
    return 1 if "failed" in {found.status for found in record.checks} | {row.status for row in record.rows} else 0


def with_earlier(record: Record, path: Path) -> Record:
    """Returns the record with those rows of an earlier one, as fresh, that it has not measured again."""
    try:
        earlier = read_record(path)
    except RecordError:
        return record
    if proven.stale(earlier, record.machine, record.versions):
        return record
    again = {(row.group, row.precision, row.hidden, row.batch, row.steps, row.threads) for row in record.rows}
    kept = [r for r in earlier.rows if (r.group, r.precision, r.hidden, r.batch, r.steps, r.threads) not in again]
    return replace(record, rows=kept + record.rows)


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
