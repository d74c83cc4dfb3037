"""What `bigru.prove` does: the cases, the jobs in a worker process, the record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bigru.kernels import proven, registry
from bigru.kernels.backends import KERNELS
from bigru.kernels.config import Call, describe
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
    mode, here, checked = PRECISIONS[precision], torch.device(device), registry.get(kernel)
    calls = [Call(describe(here), mode.dtype, size, mode.precision) for size in hidden]
    if all(refused := [checked.refusal(call) for call in calls]):
        return Check(name, kernel, "not available", str(refused[0]))
    faults = list(checks.faults(checked, mode.dtype, mode.precision, here, hidden))
    return Check(name, kernel, "failed" if faults else "passed", "; ".join(faults)[:1000])


def time_rows(case: Case, kernel: str, device: str, threads: int | None) -> list[Row]:
    """Times a kernel at a case beside ATen's GRU, in the worker."""
    if threads is not None:
        torch.set_num_threads(threads)
    clocks = machine.WALL if device == "cpu" else {name: machine.GPU[name] for name in proven.CLOCKS}
    return machine.measure(case, kernel, torch.device(device), ROW_S, clocks=clocks)


def run(
    record: Record,
    cases: Sequence[Case],
    kernels: Sequence[str],
    device: str,
    threads: int | None,
    make_worker: Callable[[], Worker],
    left: Callable[[], float],
    hidden: Sequence[int] = checks.HIDDEN,
) -> None:
    """Checks the kernels and times those that are right; what there is no time for is left out, and so unproven.

    Args:
        record: takes what is found.
        cases: in their order.
        kernels: by name.
        device: "cuda" or "cpu".
        threads: of a CPU, else None.
        make_worker: makes what runs the jobs, each of which may crash or hang.
        left: returns the seconds that are left.
        hidden: sizes of the checks.
    """

    def checked(kernel: str, precision: str, worker: Worker) -> Check:
        name = f"against fp64, {precision}"
        try:
            return worker.run(min(JOB_S, left()), check, name, kernel, precision, device, hidden)
        except JobFailed as why:
            return Check(name, kernel, "failed", str(why))
        except JobLate as why:
            return Check(name, kernel, "not available", str(why))

    jobs = list(itertools.product(kernels, dict.fromkeys(case.precision for case in cases)))
    crew = [make_worker() for _ in jobs]
    try:
        # All at once: they compile for most of the time. Timings then have the machine to themselves.
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            record.checks += pool.map(checked, *zip(*jobs, strict=True), crew)
        for worker in crew[1:]:
            worker.close()
        for found in record.checks:
            print(f"{found.candidate:12} {found.name}: {found.status} {found.message}"[:COLUMNS])
        right = {(found.candidate, found.name) for found in record.checks if found.status == "passed"}
        for case, kernel in itertools.product(cases, kernels):
            if (kernel, f"against fp64, {case.precision}") not in right:
                continue
            if left() < 1:
                record.complete = False
                return
            try:
                rows = crew[0].run(min(JOB_S, left()), time_rows, case, kernel, device, threads)
            except JobFailed as why:
                about: dict[str, Any] = vars(case) | {"candidate": kernel, "rival": NN_GRU, "threads": threads}
                rows = [Row(**about, mode=mode, status="failed", message=str(why)) for mode in MODES]
            except JobLate:
                record.complete = False
                continue
            record.rows += [row for row in rows if row.status != "refused"]
            if line := table_line(case, kernel, rows):
                print(line)
    finally:
        for worker in crew:
            worker.close()


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
    sizes: dict[str, tuple[int, ...]],
    precisions: Sequence[str] | None,
    threads: int | None,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Proves the kernels on this machine; returns the command's exit code: 0, 1 where a kernel is wrong."""
    end, device, worker = now() + seconds, this_device().type, Worker()
    try:
        about, versions, place = worker.run(START_S, describe_here, device)
    finally:
        worker.close()
    record, path = Record("proof", command, about, versions), Path(place)
    earlier = earlier_rows(record, path)
    default, usual = (GRID, ["fp32", "bf16"]) if device == "cuda" else (CPU_GRID, ["fp32"])
    threads = (threads or torch.get_num_threads()) if device == "cpu" else None
    # What no earlier run had the time for comes first.
    known = {size_of(row) for row in earlier if row.threads == threads}
    cases = sorted(grid(**default | sizes, precisions=precisions or usual), key=lambda case: size_of(case) in known)
    run(record, cases, candidates(device), device, threads, Worker, lambda: end - now())
    record.seconds = round(seconds - (end - now()), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    again = {(row.threads, size_of(row)) for row in record.rows}
    kept = [row for row in earlier if (row.threads, size_of(row)) not in again]
    replace(record, rows=kept + record.rows).write(path)
    print(f"times as fast as ATen's GRU, median and quartiles; {record.seconds:.0f} s, {path}")
    if left := len({size_of(case) for case in cases} - {size_of(row) for row in kept + record.rows}):
        print(f"{left} of {len(cases)} sizes are not timed: again, or with --seconds, for more")
    return 1 if "failed" in {found.status for found in record.checks} | {row.status for row in record.rows} else 0


def earlier_rows(record: Record, path: Path) -> list[Row]:
    """Returns the rows of an earlier record of the same machine and versions."""
    try:
        earlier = read_record(path)
    except RecordError:
        return []
    return [] if proven.stale(earlier, record.machine, record.versions) else earlier.rows


def size_of(case: Case | Row) -> tuple[object, ...]:
    """Returns what tells cases of a proof apart."""
    return case.group, case.precision, case.hidden, case.batch, case.steps


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
