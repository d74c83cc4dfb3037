"""Times two functions in turn, round after round, so that what else the machine does falls on both alike."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timing import Work, finished, gpu_time_ms


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds in milliseconds, and nn.GRU's time over BiGRU's: above 1, BiGRU is faster."""

    name: str
    bigru_ms: float
    nn_gru_ms: float
    ratio: float
    """Median over the rounds of the ratio of each."""
    low: float
    """First quartile of the ratio."""
    high: float
    """Third quartile of the ratio."""
    bigru_gpu_ms: float | None = None
    nn_gru_gpu_ms: float | None = None


WARMUP = 3
SECONDS = 10.0
"""What one benchmark's rounds may take together."""
RESULTS: list[Comparison] = []
"""What this run has compared so far."""
NOTES: list[str] = []
"""What else it has to say, a line each."""


def compare(benchmark: BenchmarkFixture, name: str, bigru: Work, nn_gru: Work, device: torch.device) -> None:
    """Records BiGRU's times in the benchmark and nn.GRU's, taken in the same rounds, in its extra_info.

    Args:
        benchmark: pytest-benchmark's fixture.
        name: of the row in the final table.
        bigru, nn_gru: the same work on either.
        device: on a GPU the wall time runs until it is done, and its own time is measured as well.
    """
    gpu = device.type == "cuda"
    ours_and_wait, theirs_and_wait = finished(bigru, device), finished(nn_gru, device)
    times: list[float] = []

    def time_nn_gru() -> None:
        start = time.perf_counter()
        theirs_and_wait()
        times.append(time.perf_counter() - start)

    rounds = rounds_within(SECONDS, lambda: (ours_and_wait(), theirs_and_wait()))
    benchmark.pedantic(ours_and_wait, setup=time_nn_gru, rounds=rounds, warmup_rounds=WARMUP)
    if benchmark.stats is None:  # --benchmark-disable
        return
    ours = benchmark.stats.stats.data
    # The warm-up rounds come first, and are not in `ours`.
    theirs = times[-len(ours) :]
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    gpu_ms = [median_gpu_ms(work) for work in (bigru, nn_gru)] if gpu else [None, None]
    result = Comparison(name, 1e3 * statistics.median(ours), 1e3 * statistics.median(theirs), ratio, low, high, *gpu_ms)
    RESULTS.append(result)
    benchmark.extra_info.update(vars(result), nn_gru_times_s=theirs)


def rounds_within(seconds: float, work: Work) -> int:
    """How many times to run the work, from how long its second run takes: the first compiles."""
    work()
    start = time.perf_counter()
    work()
    return min(100, max(5, int(seconds / (time.perf_counter() - start))))


def median_gpu_ms(work: Work, rounds: int = 50) -> float:
    """Median of the device's own time over the rounds."""
    return statistics.median(gpu_time_ms(work) for _ in range(rounds))


def table() -> str:
    """Every comparison of this run, one a line."""
    width = max(len(result.name) for result in RESULTS)
    head = f"{'':{width}}  {'BiGRU':>9}  {'nn.GRU':>9}  {'ratio (quartiles)':>18}"
    lines = [head + (f"  {'GPU time':>9}  {'nn.GRU':>9}" if RESULTS[0].bigru_gpu_ms is not None else "")]
    for r in RESULTS:
        line = f"{r.name:{width}}  {r.bigru_ms:6.2f} ms  {r.nn_gru_ms:6.2f} ms"
        line += f"   {r.ratio:.2f} ({r.low:.2f}-{r.high:.2f})"
        if r.bigru_gpu_ms is not None:
            line += f"  {r.bigru_gpu_ms:6.3f} ms  {r.nn_gru_gpu_ms:6.3f} ms"
        lines.append(line)
    return "\n".join(lines)
