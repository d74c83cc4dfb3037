"""Where pytest's benchmarks run, the record that they write with --record, and the table at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

# The package is found where it is not installed, and so is this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.record import NN_GRU, Record, Row
from benchmarks.timing import compare, wall_ms
from benchmarks.workloads import Case, errors, make, products, verdict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 10.0
"""For the rounds of one comparison."""
ROWS = pytest.StashKey[list[Row]]()
NOTES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="DIR", help="folder for a record of the comparisons")


def pytest_configure(config: pytest.Config) -> None:
    # A benchmark whose proof fails times nothing: one failure is enough.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.stash[ROWS], config.stash[NOTES] = [], []


def pytest_report_header() -> str:
    """Says in one line where the comparison runs."""
    if DEVICE.type == "cuda":
        return f"GPU comparison on {torch.cuda.get_device_name()}: nn.GRU runs in cuDNN"
    return f"CPU comparison on {torch.get_num_threads()} threads: nothing below says anything about the GPU's kernels"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the comparisons of this run after everything else, and writes the record."""
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("BiGRU against nn.GRU")
        terminalreporter.write_line(pytest_report_header())
    for row in rows:
        case = f"{row.group} {row.mode} {row.precision} B={row.batch} T={row.steps} H={row.hidden}"
        terminalreporter.write_line(
            f"{case:50} {row.candidate:12} {row.ours_ms:8.2f} ms, nn.GRU {row.rival_ms:8.2f} ms, "
            f"{row.ratio:.2f} times as fast ({row.low:.2f} to {row.high:.2f})"
        )
    for note in config.stash[NOTES]:
        terminalreporter.write_line(note)
    if (folder := config.getoption("--record")) is not None and rows:
        command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
        found = Record(
            DEVICE.type.replace("cuda", "gpu"),
            command,
            machine.describe_machine(DEVICE),
            machine.describe_versions(),
            rows=rows,
        )
        terminalreporter.write_line(str(found.write(folder)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Returns a GPU if there is one."""
    return DEVICE


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Returns what adds a line to the summary."""
    return request.config.stash[NOTES].append


@pytest.fixture
def beside_nn_gru(
    benchmark: BenchmarkFixture, device: torch.device, request: pytest.FixtureRequest
) -> Callable[[Case, str], None]:
    """Returns what proves BiGRU right at a case and benchmarks it, with nn.GRU timed in the same rounds."""

    def run(case: Case, mode: str) -> None:
        with products(case.precision):
            theirs = make(NN_GRU, case, device)
            ours = make("auto", case, device)
            found = errors(ours, case, device)
            assert not verdict(found, case)
            rival_ms: list[float] = []
            work, rival = ours.works[mode], theirs.works[mode]
            # Each runs twice: the first compiles.
            once_ms = [wall_ms(work) + wall_ms(rival) for _ in range(2)][1]
            benchmark.group = case.group
            benchmark.pedantic(
                lambda: wall_ms(work),
                setup=lambda: rival_ms.append(wall_ms(rival)),
                rounds=min(100, max(5, int(1e3 * SECONDS / once_ms))),
                warmup_rounds=2,
            )
        if benchmark.stats is None:  # --benchmark-disable
            return
        ours_ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
        # The warm-up rounds come first, and are not among ours.
        figures = compare(ours_ms, rival_ms[-len(ours_ms) :])
        about = vars(case) | {"mode": mode, "candidate": ours.name, "rival": NN_GRU, "error": max(found.values())}
        threads = torch.get_num_threads() if device.type == "cpu" else None
        request.config.stash[ROWS].append(Row(**about, **figures, threads=threads))
        benchmark.extra_info.update(about | figures)

    return run
