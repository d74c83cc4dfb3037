"""`BiGRU` beside nn.GRU under pytest-benchmark, and the comparisons in 100 columns at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

# The package is found where it is not installed, and so is this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu import line
from benchmarks.workloads import make
from bigru.kernels.record import NN_GRU, Row
from bigru.proof.timing import SETTLE_S, compare, settled_ms, wall_ms
from bigru.proof.workloads import Case, errors, products, verdict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 4.0
"""For the rounds of one comparison."""
LINES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    # A benchmark whose proof fails times nothing: one failure is enough.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.stash[LINES] = []


def pytest_report_header() -> str:
    """Says in one line where the comparison runs."""
    if DEVICE.type == "cuda":
        return f"GPU comparison on {torch.cuda.get_device_name()}: nn.GRU runs in cuDNN"
    return f"CPU comparison on {torch.get_num_threads()} threads: nothing below says anything about the GPU's kernels"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the comparisons of this run after everything else."""
    if lines := config.stash[LINES]:
        terminalreporter.section("times as fast, and quartiles")
        for text in (pytest_report_header(), *lines):
            terminalreporter.write_line(text)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Returns what adds a line to the summary."""
    return request.config.stash[LINES].append


@pytest.fixture
def beside_nn_gru(benchmark: BenchmarkFixture, note: Callable[[str], None]) -> Callable[[Case, str], None]:
    """Returns what proves BiGRU right at a case and benchmarks it, with nn.GRU timed in the same rounds."""

    def run(case: Case, mode: str) -> None:
        on_cpu, rival_ms = DEVICE.type == "cpu", list[float]()
        with products(case.precision):
            theirs, ours = (make(name, case, DEVICE) for name in (NN_GRU, "auto"))
            found = errors(ours, theirs)
            assert not verdict(found, case)
            work, rival = ours.works[mode], theirs.works[mode]
            # Each runs twice: the first compiles.
            once_ms = [wall_ms(work) + wall_ms(rival) for _ in range(2)][1]

            def rest_of_round() -> None:
                rival_ms.append((settled_ms if on_cpu else wall_ms)(rival))
                if on_cpu:  # as `settled_ms`
                    time.sleep(SETTLE_S)
                    work()

            benchmark.group = case.group
            rounds = min(100, max(5, int(500 * SECONDS / once_ms)))
            benchmark.pedantic(lambda: wall_ms(work), setup=rest_of_round, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        ours_ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        # The warm-up round comes first, and is not among ours.
        figures = compare(ours_ms, rival_ms[-len(ours_ms) :])
        about = vars(case) | {"mode": mode, "candidate": ours.name, "rival": NN_GRU, "error": max(found.values())}
        benchmark.extra_info.update(about | figures)
        note(line(Row(**about, **figures, threads=torch.get_num_threads() if on_cpu else None)))

    return run
