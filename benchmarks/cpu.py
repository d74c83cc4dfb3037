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

ROOT = Path(__file__).resolve().parents[1]
# The tests' helpers are used here too.
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from benchmarks import machine  # noqa: E402
from benchmarks.record import GEMM, NN_GRU, Record, Row, read_record  # noqa: E402
from benchmarks.workloads import MAIN, Case, sweep  # noqa: E402

BOTH, FORWARD = ("forward", "training"), ("forward",)
Job = tuple[Case, str, tuple[str, ...]]


def jobs(main: Case = MAIN) -> Iterator[Job]:
    """Yields case, rival and modes, the most valuable first."""
    batches = sweep(main, batch=(1, 8, 64, 256, 2))
    for case in batches:
        yield case, NN_GRU, BOTH
    for case in batches[:3]:
        yield case, "onnxruntime", FORWARD
    yield Case("call", batch=1, steps=1), NN_GRU, BOTH
    yield replace(main, group="training step"), NN_GRU, ("training",)
    yield main, GEMM, BOTH
    for case in batches[:3]:
        yield replace(case, group="busy core"), NN_GRU, BOTH
    for case in sweep(main, hidden=(32, 64, 256, 512), steps=(15, 240)):
        yield case, NN_GRU, BOTH


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
            with keep_a_core_busy() if case.group == "busy core" else nullcontext():
                record.rows += machine.measure(case, backend, torch.device("cpu"), row_s, rival=rival, modes=modes)
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
    options.out.mkdir(parents=True, exist_ok=True)
    record = read_record(options.add) if options.add else Record("cpu", command, *about, complete=False)
    run(record, options.out, options.backend, options.threads, options.row_seconds, options.seconds)
    for row in record.rows:
        size = f"{row.group:13} {row.mode:8} B={row.batch:<4} T={row.steps:<4} H={row.hidden:<4} {row.threads} threads"
        figures = (
            f"{row.ratio:6.2f} ({row.low:.2f} to {row.high:.2f})" if row.ratio is not None and row.low else row.message
        )
        print(f"{size} {row.candidate:6} beside {row.rival:12} {figures}")
    print(options.out / record.name)
    return 1 if any(row.status == "failed" for row in record.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
