"""Gives jobs to worker processes, so that a kernel which crashes, hangs or spoils the GPU's context costs one part.

A worker answers in lines of JSON: {"start": part}, or {"start": null} where all parts run together from then on,
{"part": part, "rows": [...]}, and {"done": true} after a job.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu_record import KERNELS, Budget, Record, Row
from benchmarks.plan import Job

ROOT = Path(__file__).resolve().parents[1]


class WorkerLost(Exception):
    """A worker that ended, or did not answer in time; the message says which."""


class Worker(Protocol):
    """What is asked of a worker."""

    def send(self, order: dict[str, Any]) -> None:
        """Gives it a job."""

    def receive(self, timeout: float) -> dict[str, Any]:
        """Its next answer; raises WorkerLost."""

    def close(self) -> None:
        """Ends it, whatever it is doing."""


class Process:
    """A worker in a process of its own: `python -m benchmarks.worker`."""

    def __init__(self, environment: dict[str, str], *, cpu: bool) -> None:
        # The package is found where it is not installed, and so is what the tests share.
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *(["--cpu"] if cpu else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment,
            # A group of its own, so that what it starts (compilers, a sanitizer) ends with it.
            start_new_session=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._obituary = ""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers, self._errors as errors:
            for line in answers:
                self._answers.put(line)
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            errors.seek(0)
            last = " | ".join(errors.read()[-2000:].strip().splitlines()[-3:])
        self._obituary = f"the process ended with {how}: {last}"
        self._answers.put(None)

    def send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            self._listener.join()
            raise WorkerLost(self._obituary) from error

    def receive(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            raise WorkerLost(f"no answer for {timeout:.0f} s; the process was stopped") from None
        if line is None:
            raise WorkerLost(self._obituary)
        return json.loads(line)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._listener.join()
        assert self._process.stdin is not None
        # What it was never told is of no interest.
        with suppress(BrokenPipeError):
            self._process.stdin.close()


class Post:
    """A place for one worker, which is hired when there is work and replaced when it is lost."""

    def __init__(self, hire: Callable[[], Worker]) -> None:
        self._hire = hire
        self._worker: Worker | None = None
        self._closed = False

    def worker(self) -> Worker:
        """The worker, a new one where there is none."""
        if self._closed:
            raise WorkerLost("the run was interrupted")
        if self._worker is None:
            self._worker = self._hire()
        return self._worker

    def dismiss(self) -> None:
        """Ends the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def close(self) -> None:
        """Ends the worker, and hires no other."""
        self._closed = True
        self.dismiss()


def carry_out_all(
    jobs: Iterable[Job], posts: Sequence[Post], record: Record, budget: Budget, reserve_s: float = 0.0
) -> list[Job]:
    """Carries out the jobs in their order, one at a time for each post, and saves the record after each.

    Args:
        jobs: most valuable first.
        posts: who works on them.
        record: takes in what is found out.
        budget: looked at before every job.
        reserve_s: what must be left of it for a job to begin.

    Returns:
        The jobs that were not begun.
    """
    waiting, lock = list(jobs), threading.Lock()

    def work_through(post: Post) -> None:
        while True:
            with lock:
                if not waiting or budget.left() <= reserve_s:
                    return
                job = waiting.pop(0)
            carry_out(job, post, record, budget)
            record.save()

    with ThreadPoolExecutor(len(posts)) as pool:
        try:
            # result() hands on what a thread raised.
            for future in [pool.submit(work_through, post) for post in posts]:
                future.result()
        except BaseException:
            with lock:
                waiting.clear()
            for post in posts:
                post.close()
            raise
    return waiting


def carry_out(job: Job, post: Post, record: Record, budget: Budget) -> None:
    """Has one job done; every row of every part ends up in the record, whatever happens to the worker."""
    pending = dict(job.parts)
    for part, rows in job.parts.items():
        if job.section == "timings" and (why := known_wrong(rows[0], record)) is not None:
            record.add(job.section, settled(pending.pop(part), "failed", why))
    while pending:
        started = None
        limit = min(job.limit_s, budget.left())
        try:
            worker = post.worker()
            worker.send({"do": job.do, "parts": pending, "args": job.args})
            while "done" not in (answer := worker.receive(limit)):
                started = answer.get("start", started)
                if "rows" in answer:
                    record.add(job.section, answer["rows"])
                    del pending[answer["part"]]
                limit = min(job.limit_s, budget.left())
            missed, why = list(pending), "the worker left it out"
        except WorkerLost as lost:
            post.dismiss()
            why = str(lost)
            missed = []
            if started is None:
                # All together, or none yet: it cannot be said which of them it was.
                missed = list(pending)
            elif started in pending:
                missed = [started]
            # Else the part has reported its own failure and left the device dead; the others are tried again.
        status = job.late if budget.left() > 0 else "out of time"
        for part in missed:
            record.add(job.section, settled(pending.pop(part), status, why))


def known_wrong(row: Row, record: Record) -> str | None:
    """Why a timing row's kernel is not to be timed."""
    if row["path"] not in KERNELS:
        return None
    return record.wrong(row["path"], row["hidden"], row["dtype"], row["precision"])


def settled(rows: list[Row], status: str, message: str) -> list[Row]:
    """Rows that end without a figure, and why."""
    return [row | {"status": status, "message": message} for row in rows]
