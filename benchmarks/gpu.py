"""One command for a GPU machine: `python -m benchmarks.gpu --out DIR` proves every kernel, then times it.

Within its minutes it does what it can, most valuable first, and writes DIR/<card>-<date>.json anew after every job, so
that a run which is killed leaves all that it had. `--cpu-smoke` runs the same code, tiny, without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_record import Budget, Record, Row, summary
from benchmarks.plan import FULL, SMOKE, Plan
from benchmarks.supervisor import ROOT, Post, Process, Worker, WorkerLost, carry_out_all, settled

# cuBLAS and Triton read these when they start. Checks ask for deterministic algorithms, which refuse to run without the
# first; timings are taken without it, as users run.
CHECKING = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

CHECKING_SHARE = 0.38
"""What of the time the checks may take before the timings, most of it compilation; what is left of them follows."""
MOST_CHECKERS = 12
"""Each is a process with a context of its own on the GPU."""
START_S = 120.0
"""What the first import of torch on a cold disk may take."""
LAST_S = 5.0
"""With less than this left nothing is begun any more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 something is wrong, 2 no device, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    parser.add_argument("--cpu-smoke", action="store_true", help="the same code at tiny sizes on a CPU")
    # What compute-sanitizer is given to watch.
    parser.add_argument("--small", nargs="+", metavar=("KERNEL", "H"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.small:
        return small(arguments.small[0], [int(hidden) for hidden in arguments.small[1:]])
    if arguments.out is None:
        parser.error("--out: say where the JSON file goes")
    budget = Budget(60 * arguments.minutes)
    smoke = arguments.cpu_smoke
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    plan, common = (SMOKE, INTERPRETED) if smoke else (FULL, {})
    checkers = 1 if smoke else max(1, min(MOST_CHECKERS, (os.cpu_count() or 2) - 2))

    def hire(environment: dict[str, str]) -> Callable[[], Worker]:
        return lambda: Process(common | environment, cpu=smoke)

    # A run that is told to end takes its workers along.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    timer, checking = Post(hire({})), [Post(hire(CHECKING)) for _ in range(checkers)]
    try:
        try:
            found = describe_machine(timer)
        except WorkerLost as lost:
            print(f"benchmarks.gpu: {lost}", file=sys.stderr)
            return 2
        record = new_record(arguments.out, found, budget, command, smoke=smoke)
        run(plan, record, budget, timer, checking)
    except KeyboardInterrupt:
        print("benchmarks.gpu: interrupted; what it had is in the file", file=sys.stderr)
        return 130
    finally:
        for post in (timer, *checking):
            post.close()
        signal.signal(signal.SIGTERM, before)
    print(summary(record))
    print(f"{budget.spent():.0f} s; {record.path}")
    return 1 if record.failures() else 0


def run(plan: Plan, record: Record, budget: Budget, timer: Post, checking: Sequence[Post]) -> None:
    """All stages, the most valuable first. Timings have the machine to themselves."""
    reserve_s = max(LAST_S, (1 - CHECKING_SHARE) * budget.left())
    unchecked = carry_out_all(plan.correctness(), checking, record, budget, reserve_s)
    for post in checking:
        post.dismiss()
    timed = [plan.facts(), *plan.main_workload(), *plan.training(), *plan.sweeps(plan.sweep_modes)]
    left = carry_out_all(timed, [timer], record, budget, LAST_S)
    left += carry_out_all(unchecked, checking, record, budget, LAST_S)
    for post in checking:
        post.dismiss()
    left += carry_out_all([*plan.slow_rivals(), *plan.sweeps(plan.late_sweep_modes)], [timer], record, budget, LAST_S)
    for job in left:
        for rows in job.parts.values():
            record.add(job.section, settled(rows, "out of time", "the minutes were over before its turn"))
    record.save(complete=not left and budget.left() > 0)


def describe_machine(timer: Post) -> Row:
    """The record's "machine" and "versions", asked of a worker: this process leaves the GPU alone.

    Raises:
        WorkerLost: there is no device to work on.
    """
    worker = timer.worker()
    worker.send({"do": "machine", "parts": {"machine": [{"status": None}]}, "args": {}})
    found: Row = {}
    while "done" not in (answer := worker.receive(START_S)):
        for row in answer.get("rows", []):
            found |= row
    if "machine" not in found:
        raise WorkerLost(str(found.get("message")))
    return found


def new_record(folder: Path, found: Row, budget: Budget, command: str, *, smoke: bool) -> Record:
    """An empty record in its file."""
    now = datetime.now(UTC)
    name = "cpu-smoke" if smoke else found["machine"]["card"].replace(" ", "-")
    header = {
        "schema": 1,
        "kind": "cpu-smoke" if smoke else "gpu",
        "date": now.isoformat(timespec="seconds"),
        "command": command,
        "complete": False,
        "seconds": 0.0,
        "machine": found["machine"],
        "versions": found["versions"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / f"{name}-{now.date().isoformat()}.json", header, budget.spent)
    record.save()
    return record


def small(kernel: str, hidden: list[int]) -> int:
    """Small calls of one kernel and nothing else; this process is the one under watch."""
    # Out of a cached block PyTorch's allocator would let a kernel write unseen.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from benchmarks.correctness import small_calls
    from benchmarks.machine import Gpu

    return 0 if small_calls(Gpu(), kernel, hidden) else 1


if __name__ == "__main__":
    sys.exit(main())
