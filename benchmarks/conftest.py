"""Where the benchmarks run, what the record says of the place, and the table at the end."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

# The package is found where it is not installed, and so is this folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paired import NOTES, RESULTS, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    """A benchmark whose proof fails times nothing: one failure is enough."""
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_report_header() -> str:
    """One line that says what the figures below are worth."""
    if DEVICE.type == "cuda":
        return f"GPU comparison on {torch.cuda.get_device_name()}: nn.GRU runs in cuDNN"
    return "CPU comparison: no GPU here, so nothing below says anything about the kernels"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Adds card and versions to the JSON record, and takes the machine's name out of it."""
    for name in ("node", "release", "python_build"):
        machine_info.pop(name, None)
    gpu = DEVICE.type == "cuda"
    machine_info["bigru"] = {
        "card": torch.cuda.get_device_name() if gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "numpy": version("numpy"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "precision": "the mode in each benchmark's extra_info",
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ratios of this run, after everything else."""
    if RESULTS:
        terminalreporter.section("BiGRU against nn.GRU")
        terminalreporter.write_line(pytest_report_header())
        terminalreporter.write_line(table())
    if NOTES:
        terminalreporter.section("bigru.train")
        for note in NOTES:
            terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU if there is one."""
    return DEVICE
