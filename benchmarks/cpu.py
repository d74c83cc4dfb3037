"""Times a CPU's backend beside nn.GRU and onnxruntime: `python -m benchmarks.cpu`; `--out DIR` records it.

Without a record it also times an epoch of `bigru.train` beside the network's own share of it, and reading a dataset.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch

from benchmarks.workloads import MAIN, Case, make, sweep
from bigru.kernels.cpu import best_instructions
from bigru.kernels.record import GEMM, NN_GRU, Record, Row, read_record
from bigru.proof import machine
from bigru.proof.timing import compare, interleaved

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
    folder: Path | None,
    backend: str,
    threads: Sequence[int],
    row_s: float,
    seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Measures every job that the record lacks on every number of threads, and writes the record after each.

    Args:
        record: takes the rows.
        folder: of the record's file; None: none is written.
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
            if folder is not None:
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
    size = f"{row.group} {row.mode} B={row.batch} T={row.steps} H={row.hidden}, threads {row.threads}"
    if row.ratio is None:
        return f"{size}: {row.message}"[:100]
    figures = f"{row.ours_ms:9.3f} ms {row.ratio:6.2f} ({row.low:.2f}-{row.high:.2f})"
    return f"{size:46} {row.candidate} to {row.rival:11} {figures}"[:100]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, or 1 where the backend is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of a record (default: none is written)")
    parser.add_argument("--backend", default="auto", help="of BiGRU (default: the one that it takes)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (default: 1; of a record 1 2)")
    parser.add_argument("--row-seconds", type=float, help="for the rounds of one row (default: 0.5; of a record 2)")
    parser.add_argument("--seconds", type=float, help="for everything (default: 150; of a record 600)")
    parser.add_argument("--add", type=Path, metavar="RECORD", help="measure what this record of the machine lacks")
    options = parser.parse_args(argv)
    threads, row_s, seconds = ([1, 2], 2.0, 600.0) if options.out else ([1], 0.5, 150.0)
    threads = options.threads or threads
    command = shlex.join(["python", "-m", "benchmarks.cpu", *(sys.argv[1:] if argv is None else argv)])
    about = machine.describe_machine(torch.device("cpu")), machine.describe_versions("onnxruntime")
    record = read_record(options.add) if options.add else Record("cpu", command, *about, complete=False)
    built = best_instructions().replace("none", "not built")
    print(f"{record.machine['name']}, CPU kernel: {built}; times as fast, and quartiles")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    run(record, options.out, options.backend, threads, options.row_seconds or row_s, options.seconds or seconds)
    if options.out:
        print(options.out / record.name)
    else:
        torch.set_num_threads(threads[0])
        for timed in (epoch, reading):
            print(*timed(options.row_seconds or row_s), sep="\n")
    return 1 if any(row.status == "failed" for row in record.rows) else 0


def epoch(seconds: float) -> Iterator[str]:
    """Yields what an epoch of training adds to as many steps and forward passes of the network on one batch."""
    from bigru import HandForecaster
    from bigru.config import TrainConfig
    from bigru.data.windows import Dataset, Windows
    from bigru.training.distributed import Team
    from bigru.training.step import TrainStep, make_optimizer
    from bigru.training.trainer import Trainer

    def windows(count: int) -> Windows:
        frames, generator = 15 * count + 2 * MAIN.steps, torch.Generator().manual_seed(0)
        # A walk, so that a frame foretells the next as it does in a recording.
        features = torch.randn(frames, MAIN.input, generator=generator).cumsum(0).mul_(0.01).tanh_()
        present, starts = torch.rand(frames, 2, generator=generator) < 0.95, torch.arange(count) * 15
        rates, clip = torch.full((count,), 59.0), torch.zeros(count, dtype=torch.int64)
        return Windows(features, present, starts, rates, clip, ("generated",), MAIN.steps, MAIN.steps)

    # As many to train to each to validate as in the full dataset, in a twenty-ninth of its size.
    train, val = windows(4 * MAIN.batch), windows(2 * MAIN.batch)
    dataset = Dataset(train, val, val, (), {"train": 1, "val": 1, "test": 1}, 1, 0, Path(), Path())
    models = [HandForecaster(MAIN.input, MAIN.hidden, MAIN.layers) for _ in range(2)]
    step, batch = (
        TrainStep(models[0], make_optimizer(models[0], 1e-3, 1e-5), 1.0),
        train.batch(torch.arange(MAIN.batch)),
    )
    loop = Trainer(TrainConfig(), models[1], dataset, Team())

    def network() -> None:
        step.model.train()
        for _ in range(4):
            step(batch.x, batch.target, batch.present)
        step.model.eval()
        with torch.inference_mode():
            for _ in range(2):
                step.model(batch.x)

    def whole() -> None:
        loop.train_epoch(Path())
        loop.validate()
        loop.progress.update(0.0, 0.0)

    times = interleaved({"whole": whole, "network": network}, 4 * seconds)
    found = compare(times["network"], times["whole"])
    yield (
        f"an epoch of {len(train)} and {len(val)} windows: {found['rival_ms'] / 1e3:.2f} s, {found['ratio']:.3f} times "
        f"({found['low']:.3f}-{found['high']:.3f}) the network's own share"
    )


def reading(seconds: float) -> Iterator[str]:
    """Yields how long a dataset of 500 clips takes to read from them, and from the file that the first reading left."""
    from bigru.config import DataConfig
    from bigru.data.synthetic import write_synthetic
    from bigru.data.windows import load_dataset

    with tempfile.TemporaryDirectory() as folder:
        config = DataConfig(data_root=write_synthetic(Path(folder) / "clips", 500, 1))
        ways = {"its clips": replace(config, no_cache=True), "the file of frames": config}
        works = {name: functools.partial(load_dataset, way) for name, way in ways.items()}
        for name, taken in interleaved(works, seconds).items():
            low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
            yield f"a dataset of 500 clips read from {name}: {median:.0f} ms ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    sys.exit(main())
