"""Times a CPU's backend beside nn.GRU and onnxruntime, and records it: `python -m benchmarks.cpu --out DIR`."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch

from benchmarks.workloads import CALL, MAIN, Case, make, sweep
from bigru.kernels.cpu import best_instructions
from bigru.kernels.record import GEMM, NN_GRU, Record, Row, read_record
from bigru.proof import machine

BOTH, FORWARD = ("forward", "training"), ("forward",)
Job = tuple[Case, str, tuple[str, ...]]


def jobs(main: Case = MAIN) -> Iterator[Job]:
    """Yields case, rival and modes, the most valuable first."""
    batches = sweep(main, batch=(1, 8, 64, 256, 2))
    for case in batches:
        yield case, NN_GRU, BOTH
    for case in batches[:3]:
        yield case, "onnxruntime", FORWARD
    yield CALL, NN_GRU, BOTH
    yield replace(main, group="training step"), NN_GRU, ("training",)
    yield main, GEMM, BOTH
    for case in batches[:3]:
        yield replace(case, group="busy core"), NN_GRU, BOTH
    for case in sweep(main, hidden=(32, 64, 256, 512), steps=(15, 240)):
        yield case, NN_GRU, BOTH
    # It unrolls the loop: 60 steps take minutes to compile.
    yield replace(main, batch=1, steps=15), "torch.compile", FORWARD


def run(
    record: Record,
    folder: Path,
    backend: str,
    threads: Sequence[int],
    row_s: float,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measures every job that the record lacks on every number of threads, and writes the record after each.

    Args:
        record: takes the rows.
        folder: of the record's file.
        backend: of BiGRU.
        threads: numbers of threads.
        row_s: for the rounds of one row.
        seconds: nothing is begun after them.
        now: a clock in seconds.
    """
    start, before = now() - record.seconds, torch.get_num_threads()
    end = now() + seconds
    done = {(_case_of(row), row.rival, row.threads) for row in record.rows}
    waiting = [(*job, count) for job in jobs() for count in threads if (*job[:2], count) not in done]
    try:
        while waiting and now() < end:
            case, rival, modes, count = waiting.pop(0)
            torch.set_num_threads(count)
            device = torch.device("cpu")
            with keep_a_core_busy() if case.group == "busy core" else nullcontext():
                rows = machine.measure(case, backend, device, row_s, rival=rival, modes=modes, made=make)
            record.rows += rows
            print(*map(line, rows), sep="\n")
            record.seconds, record.complete = round(now() - start, 1), not waiting
            record.write(folder)
    finally:
        torch.set_num_threads(before)


@contextmanager
def keep_a_core_busy() -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process that does nothing but compute beside the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _case_of(row: Row) -> Case:
    return Case(**{field.name: getattr(row, field.name) for field in fields(Case)})


def line(row: Row) -> str:
    """Returns a row's words and figures, in at most 100 columns."""
    threads = "" if row.threads is None else f", threads {row.threads}"
    precision = "" if row.precision == "fp32" else f" {row.precision}"
    size = f"{row.group} {row.mode}{precision} B={row.batch} T={row.steps} H={row.hidden}{threads}"
    if row.ratio is None:
        return f"{size}: {row.message}"[:100]
    figures = f"{row.ours_ms:9.3f} ms {row.ratio:6.2f} ({row.low:.2f}-{row.high:.2f})"
    return f"{size:46} {row.candidate} to {row.rival} {figures}"[:100]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, or 1 where the backend is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the JSON file")
    parser.add_argument("--backend", default="auto", help="of BiGRU (default: the one that it takes)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--row-seconds", type=float, default=2.0, help="for the rounds of one row (default: 2)")
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything (default: %(default)s)")
    parser.add_argument("--add", type=Path, metavar="RECORD", help="measure what this record of the machine lacks")
    options = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.cpu", *(sys.argv[1:] if argv is None else argv)])
    about = machine.describe_machine(torch.device("cpu")), machine.describe_versions("onnxruntime")
    record = read_record(options.add) if options.add else Record("cpu", command, *about, complete=False)
    built = best_instructions().replace("none", "not built")
    print(f"{record.machine['name']}, CPU kernel: {built}; times as fast, and quartiles")
    options.out.mkdir(parents=True, exist_ok=True)
    run(record, options.out, options.backend, options.threads, options.row_seconds, options.seconds)
    print(options.out / record.name)
    return 1 if any(row.status == "failed" for row in record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
