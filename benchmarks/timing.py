"""Times pieces of work in turn, round after round, so that what else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_record import FIGURES, Row

if TYPE_CHECKING:
    from benchmarks.machine import Machine

Work = Callable[[], object]

WARMUP_S = 0.1
"""What the unrecorded rounds take at least: an idle GPU's clock is low."""
CYCLES_PER_MS = 2_000_000
"""At 2 GHz; a GPU of a lower clock waits longer, which does no harm."""


@dataclass(frozen=True)
class Contestant:
    """One path through a piece of work, by figure: eager for the first two, a graph's replay for the last."""

    name: str
    works: dict[str, Work]
    by_wall: bool = False
    """Whether a replay is timed by the wall clock too: work in which the CPU takes part all along."""

    def clock(self, figure: str) -> str:
        """How a figure is timed."""
        return "eager_ms" if self.by_wall else figure


def race(
    machine: Machine, contestants: list[Contestant], seconds: float, most: int = 200
) -> dict[str, dict[str, list[float]]]:
    """Times every contestant in every round, the figures one after the other.

    Args:
        machine: keeps the time.
        contestants: as many as there are.
        seconds: what all rounds together may take; the machine's fewest are run whatever they take.
        most: rounds for each figure.

    Returns:
        Milliseconds, one number a round, by contestant and figure.
    """
    times: dict[str, dict[str, list[float]]] = {contestant.name: {} for contestant in contestants}
    figures = [figure for figure in FIGURES if any(figure in contestant.works for contestant in contestants)]
    for figure in figures:
        running = [contestant for contestant in contestants if figure in contestant.works]
        leads = {contestant.name: lead_ms(machine, contestant.works[figure]) for contestant in running}

        start = time.perf_counter()
        count = 0
        while count == 0 or time.perf_counter() - start < WARMUP_S:
            one_round(machine, running, figure, leads, count)
            count += 1
        a_round = (time.perf_counter() - start) / count
        rounds = min(most, max(machine.fewest_rounds, int(seconds / len(figures) / a_round)))
        for number in range(rounds):
            for name, milliseconds in one_round(machine, running, figure, leads, number).items():
                times[name].setdefault(figure, []).append(milliseconds)
    return times


def one_round(
    machine: Machine, running: list[Contestant], figure: str, leads: dict[str, float], number: int
) -> dict[str, float]:
    """Every contestant once. Each in turn goes first, since the first may find caches or clock in another state."""
    first = number % len(running)
    order = running[first:] + running[:first]
    return {c.name: machine.time_ms(c.clock(figure), c.works[figure], leads[c.name]) for c in order}


def lead_ms(machine: Machine, work: Work) -> float:
    """How long the CPU takes to ask for the work, which may go on after that."""
    machine.finish()
    start = time.perf_counter()
    work()
    asked = 1e3 * (time.perf_counter() - start)
    machine.finish()
    return asked


def figures_of(times: dict[str, list[float]]) -> Row:
    """Medians and quartiles of a contestant's times, as a row of the record has them."""
    found: Row = {"quartiles": {}, "rounds": min(map(len, times.values()))}
    for figure, milliseconds in times.items():
        low, found[figure], high = statistics.quantiles(milliseconds, n=4)
        found["quartiles"][figure] = [low, high]
    return found


def gpu_time_ms(work: Work, lead_ms: float = 10.0) -> float:
    """Time between two CUDA events around the work, without what the CPU takes to launch it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # So long the GPU does nothing, and the CPU gets ahead of it; but the queue of launches holds only so many.
    wait_ms = min(1.5 * lead_ms + 0.1, 50.0)
    torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def finished(work: Work, device: torch.device) -> Work:
    """The work and the wait for its end."""
    if device.type != "cuda":
        return work

    def wait_too() -> None:
        work()
        torch.cuda.synchronize(device)

    return wait_too
