"""Checks every kernel on a GPU machine, then times it: `python -m benchmarks.gpu --out DIR`.

Within its minutes it does what it can, most valuable first, and writes DIR/<card>-<date>-<time>.json anew after every
job, so that a run which is killed leaves all that it had. `--cpu-smoke` runs the same code, tiny, without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.workloads import MAIN, Case, sweep
from bigru.kernels import registry
from bigru.kernels.proven import proofs_of
from bigru.kernels.record import NN_GRU, Check, Record, Row
from bigru.proof import checks, machine, prover
from bigru.proof.pool import JobFailed, JobLate, Worker
from bigru.proof.workloads import Refused, errors, verdict

ROOT = Path(__file__).resolve().parents[1]
KERNELS = tuple(name for name, entry in registry.KERNELS.items() if entry.auto == "cuda" and entry.public)

INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
START_S = 180.0
"""For the first import of torch and CUDA on a cold disk."""
LAST_S = 5.0
"""Nothing is begun with less time left."""
FINDINGS = 9
"""Exit code by which compute-sanitizer says that it found something."""


@dataclass(frozen=True)
class Plan:
    """Sizes of everything; the defaults are for a GPU machine."""

    main: Case = MAIN
    precisions: tuple[str, ...] = ("fp32", "tf32", "bf16", "fp16")
    early: tuple[str, ...] = ("fp32", "bf16")
    """Precisions that are swept first."""
    batch: tuple[int, ...] = (1, 8, 256, 1024, 4096)
    steps: tuple[int, ...] = (15, 240, 1024)
    hidden: tuple[int, ...] = (32, 64, 96, 192, 256, 512, 1024)
    main_s: float = 2.0
    """For the rounds of one row at the main workload."""
    sweep_s: float = 0.4
    odd: tuple[int, ...] = checks.HIDDEN
    """Hidden sizes of the checks."""
    slow_rivals: tuple[tuple[str, str], ...] = (("torch.compile", "fp32"), ("flashrnn", "bf16"))
    """Rivals that compile long, and the precision in which they are met."""
    fewest: int = 5
    """Rounds of a row that are run however long they take."""
    clocks: str = "GPU"
    """Name of the clocks in benchmarks.machine."""
    device: str = "cuda"

    def main_jobs(self) -> Iterator[tuple[Case, str]]:
        """Yields case and candidate of the main workload: "auto" at everybody's defaults, every kernel, training."""
        yield replace(self.main, precision="default"), "auto"
        for precision in self.precisions:
            for kernel in KERNELS:
                yield replace(self.main, precision=precision), kernel
        for precision in ("fp32", "tf32"):
            if precision in self.precisions:
                for kernel in KERNELS:
                    yield replace(self.main, group="training step", precision=precision), kernel

    def sweeps(self, precisions: Sequence[str]) -> Iterator[tuple[Case, str]]:
        """Yields case and candidate for one size at a time around the main workload."""
        for case in sweep(self.main, hidden=self.hidden, batch=self.batch, steps=self.steps):
            for precision in precisions:
                for kernel in KERNELS:
                    yield replace(case, precision=precision), kernel


FULL = Plan()
SMOKE = Plan(
    main=Case(batch=3, steps=2, hidden=16, input=4, layers=1),
    precisions=("fp32", "bf16"),
    early=("fp32",),
    batch=(1,),
    steps=(),
    hidden=(),
    main_s=0.02,
    sweep_s=0.02,
    odd=(5,),
    slow_rivals=(("flashrnn", "bf16"),),
    fewest=2,
    clocks="TRIAL",
    device="cpu",
)


class Run:
    """One run of the command.

    Args:
        plan: what is done.
        record: takes what is found.
        seconds: for everything.
        folder: of the record's file.
        worker: runs the jobs.
        now: a clock in seconds.
    """

    def __init__(
        self,
        plan: Plan,
        record: Record,
        seconds: float,
        folder: Path,
        worker: Worker,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.record, self.worker = plan, record, worker
        self.path = folder / record.name
        self._now, self._start, self._seconds = now, now(), seconds

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self._seconds - (self._now() - self._start)

    def save(self) -> None:
        """Writes the record as it is now."""
        self.record.seconds = round(self._now() - self._start, 1)
        self.record.write(self.path)

    def check(self, name: str, kernel: str, limit_s: float, function: Callable[..., Check], *args: Any) -> None:
        """Runs a check in the worker; one that hangs or has no time left is not available, which is not failed."""
        limit = min(limit_s, self.left() - LAST_S)
        try:
            found = self.worker.run(limit, function, name, kernel, *args) if limit > 0 else None
        except JobFailed as error:
            found = Check(name, kernel, "failed", str(error))
        except JobLate as error:
            found = Check(name, kernel, "not available", str(error))
        self.record.checks.append(found or Check(name, kernel, "not available", "the minutes were over"))
        self.save()

    def time(self, case: Case, candidate: str, seconds: float, rival: str = NN_GRU, limit_s: float = 60.0) -> None:
        """Has a candidate measured beside a rival; whatever becomes of the worker, the record gets its rows."""
        limit = min(limit_s, self.left() - LAST_S)
        modes = ("training",) if case.group == "training step" else ("forward", "training")
        status, why = "late", "the minutes were over before its turn"
        if limit > 0:
            try:
                self.record.rows += self.worker.run(limit, measure, self.plan, case, candidate, rival, seconds)
                self.save()
                return
            except JobFailed as error:
                status, why = "failed", str(error)
            except JobLate as error:
                why = str(error)
        about = vars(case) | {"candidate": candidate, "rival": rival}
        self.record.rows += [Row(**about, mode=mode, status=status, message=why) for mode in modes]
        self.save()

    def all(self) -> None:
        """Runs every stage, the most valuable first. Timings have the machine to themselves."""
        plan = self.plan
        for kernel in KERNELS:
            self.check("planted defect", kernel, 60.0, planted_defect, plan.main, plan.device)
        for case, kernel in plan.main_jobs():
            self.time(case, kernel, plan.main_s)
        for name in (*KERNELS, NN_GRU):
            if self.left() > LAST_S:
                try:
                    self.record.profile[name] = self.worker.run(60.0, profile, plan.main, name, plan.device)
                except (JobFailed, JobLate) as error:
                    print(f"benchmarks.gpu: no profile of {name}: {error}", file=sys.stderr)
        for case, kernel in plan.sweeps(plan.early):
            self.time(case, kernel, plan.sweep_s)
        for kernel in KERNELS:
            for precision in plan.precisions:
                name = f"against fp64, {precision}"
                self.check(name, kernel, 60.0, prover.check, precision, plan.device, plan.odd)
            self.check("memcheck", kernel, 90.0, memcheck)
        for case, kernel in plan.sweeps([name for name in plan.precisions if name not in plan.early]):
            self.time(case, kernel, plan.sweep_s)
        # What compiles long comes last.
        for rival, precision in plan.slow_rivals:
            self.time(replace(plan.main, precision=precision), "triton", plan.main_s, rival)
        self.record.complete = all(row.status != "late" for row in self.record.rows)
        self.save()


def measure(plan: Plan, case: Case, candidate: str, rival: str, seconds: float) -> list[Row]:
    """Measures in the worker."""
    clocks, device = getattr(machine, plan.clocks), torch.device(plan.device)
    options: dict[str, Any] = {"rival": rival, "clocks": clocks, "fewest": plan.fewest, "made": workloads.make}
    return machine.measure(case, candidate, device, seconds, **options)


def profile(case: Case, candidate: str, device: str) -> list[tuple[str, int, float]]:
    """Profiles in the worker."""
    return machine.profile(case, candidate, torch.device(device), made=workloads.make)


def describe(device: str) -> tuple[dict[str, Any], dict[str, str | None]] | None:
    """Describes the machine from the worker, so that the command itself leaves the GPU alone; None without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return machine.describe_machine(torch.device(device)), machine.describe_versions("flashrnn")


def planted_defect(name: str, kernel: str, case: Case, device: str) -> Check:
    """Checks that the comparison notices a kernel whose reset and update gates are exchanged."""
    where = torch.device(device)
    try:
        wrong = workloads.make(kernel, case, where, defect=True)
    except Refused as why:
        return Check(name, kernel, "not available", str(why))
    found = verdict(errors(wrong, workloads.make(NN_GRU, case, where)), case)
    if not found:
        return Check(name, kernel, "failed", "r and z exchanged, and the comparison did not notice")
    return Check(name, kernel, "passed", f"noticed: {found}")


def memcheck(name: str, kernel: str) -> Check:
    """Runs compute-sanitizer's memcheck over a small training pass of one kernel, where the tool is installed."""
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None or not torch.cuda.is_available():
        return Check(name, kernel, "not available", "compute-sanitizer is not on the PATH, or no GPU is here")
    # Errors of the API are not the kernel's; out of a cached block PyTorch's allocator would let it write unseen.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(FINDINGS)]
    small = f"from benchmarks.gpu import small; small({kernel!r})"
    done = subprocess.run(
        [tool, *options, sys.executable, "-c", small],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
    status = {0: "passed", FINDINGS: "failed"}.get(done.returncode, "not available")
    return Check(name, kernel, status, f"exit code {done.returncode}: {' | '.join(said)}"[:500])


def small(kernel: str) -> None:
    """Runs forward and backward of one kernel at a small odd shape, under the sanitizer's watch."""
    for precision in ("fp32", "bf16"):
        case = Case(batch=9, steps=3, hidden=128, input=8, layers=1, precision=precision)
        workloads.make(kernel, case, torch.device("cuda")).works["training"]()
    torch.cuda.synchronize()


def summary(record: Record) -> str:
    """Returns what a run found, for a terminal; the main ratios last, since a log's tail keeps the end."""
    lines = [f"{check.name}, {check.candidate}: {check.status}: {check.message}" for check in record.checks]
    for row in record.rows:
        if row.status in ("failed", "refused"):
            lines.append(f"{row.status}: {_words(row)}: {row.message}")
    lines.append("right and in nothing slower than nn.GRU, so that a copy in bigru/kernels/proven commits it:")
    for (group, precision, _), sizes in proofs_of(record, "").ranked.items():
        for size, kernels in sorted(sizes.items()):
            lines.append("  {} {} H={} B={} T={}: ".format(group, precision, *size) + ", ".join(dict(kernels)))
    lines.append(", ".join(f"{count} {status}" for status, count in Counter(row.status for row in record.rows).items()))
    lines.append("times as fast as the rival (above 1: we are faster):")
    measured = [row for row in record.rows if row.status == "measured"]
    lines += [f"{_words(row):78} {row.ratio:6.2f} ({row.low:.2f} to {row.high:.2f})" for row in measured[::-1]]
    return "\n".join(lines)


def _words(row: Row) -> str:
    case = Case(row.group, row.batch, row.steps, row.hidden, row.input, row.layers, row.precision)
    return f"{row.candidate} beside {row.rival}, {case} {row.mode}, {row.clock}"


def main(argv: Sequence[str] | None = None, worker: Worker | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 something is wrong, 2 no device, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    parser.add_argument("--cpu-smoke", action="store_true", help="the same code at tiny sizes on a CPU")
    options = parser.parse_args(argv)
    plan, kind = (SMOKE, "smoke") if options.cpu_smoke else (FULL, "gpu")
    worker = worker or Worker(INTERPRETED if options.cpu_smoke else {})
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        about = worker.run(START_S, describe, plan.device)
        if about is None:
            raise JobFailed("torch finds no GPU here; --cpu-smoke tries the command on a CPU")
        words = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
        options.out.mkdir(parents=True, exist_ok=True)
        record = Record(kind, words, *about, complete=False)
        run = Run(plan, record, 60 * options.minutes, options.out, worker)
        run.all()
    except (JobFailed, JobLate) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.gpu: interrupted; what it had is in the file", file=sys.stderr)
        return 130
    finally:
        worker.close()
        signal.signal(signal.SIGTERM, before)
    print(f"{run.path}: {record.seconds:.0f} s\n{summary(record)}")
    wrong = [row for row in record.rows if row.status == "failed"] + [c for c in record.checks if c.status == "failed"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
