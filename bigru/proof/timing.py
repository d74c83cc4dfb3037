"""Times pieces of work in turn, round after round, so that what else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Work = Callable[[], object]

WARMUP_S = 0.1
"""Least time of the unrecorded rounds: an idle GPU's clock is low."""
SETTLE_S = 0.02
LONG_MS = 100.0
"""What the caches hold before a run of this length makes no difference to it."""
CYCLES_PER_MS = 2_000_000
"""At 2 GHz; a GPU of a lower clock waits longer, which does no harm."""


def interleaved(
    works: Mapping[str, Work],
    seconds: float,
    clock: Callable[[Work], float] | None = None,
    fewest: int = 5,
    most: int = 200,
) -> dict[str, list[float]]:
    """Times every work in every round; each in turn goes first, since the first may find another state of the caches.

    Args:
        works: by name.
        seconds: for all rounds together, but for the fewest.
        clock: returns the milliseconds of one run; default: the wall's.
        fewest, most: rounds.

    Returns:
        Milliseconds, one number a round, by name.
    """
    clock = clock or wall_ms
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}

    def one_round(number: int) -> None:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock(works[name]))

    start, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - start < WARMUP_S:
        # The first round compiles.
        start = time.perf_counter() if count == 1 else start
        one_round(count)
        count += 1
    round_s = (time.perf_counter() - start) / max(1, count - 1)
    rounds = min(most, max(fewest, int(seconds / round_s)))
    for taken in times.values():
        taken.clear()
    for number in range(rounds):
        one_round(number)
    return times


def compare(ours: Sequence[float], rival: Sequence[float]) -> dict[str, Any]:
    """Returns the figures of a record's row from the milliseconds of two works in the same rounds."""
    # Inclusive: of few rounds the other method goes beyond what was measured, below zero even.
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(ours, rival, strict=True)], n=4, method="inclusive")
    return {
        "ours_ms": statistics.median(ours),
        "rival_ms": statistics.median(rival),
        "ratio": ratio,
        "low": low,
        "high": high,
        "rounds": len(ours),
    }


def wall_ms(work: Work) -> float:
    """Returns the wall time of a run, until a GPU has finished it."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return 1e3 * (time.perf_counter() - start)


def settled_ms(work: Work, long_ms: float = LONG_MS) -> float:
    """Returns the wall time of a run on a CPU once the threads of whatever ran before have gone to sleep.

    OpenMP's and onnxruntime's spin for milliseconds after their work and keep a core from who is timed next. A short
    run has its caches warm, too.
    """
    time.sleep(SETTLE_S)
    taken = wall_ms(work)
    return taken if taken > long_ms else wall_ms(work)


def gpu_ms(work: Work) -> float:
    """Returns the time between two CUDA events around a run, without what the CPU takes to launch it."""
    asked = time.perf_counter()
    work()
    lead_ms = 1e3 * (time.perf_counter() - asked)
    _wait()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # So long the GPU does nothing, and the CPU gets ahead of it; but the queue of launches holds only so many.
    torch.cuda._sleep(int(min(1.5 * lead_ms + 0.1, 50.0) * CYCLES_PER_MS))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def capture_graph(work: Work, device: torch.device) -> Work:
    """Runs work three times to warm it up and returns its replay as a CUDA graph; on a CPU, in a trial, work itself."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its own stream the current one; the outer block puts ours back.
    with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        work()
    return graph.replay
