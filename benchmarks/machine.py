"""The device that the benchmarks run on: a GPU, or in its place a CPU, where the same code runs and no time counts."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu_record import Row
from benchmarks.timing import Work, gpu_time_ms
from bigru.kernels import registry
from bigru.kernels.config import Call, describe
from bigru.training.step import capture


class Machine(ABC):
    """What a benchmark asks of the device."""

    device: torch.device
    has_ptx: bool
    """Whether inline PTX runs: Triton's interpreter has none."""
    fewest_rounds: int
    """Rounds of a timing that are run however long they take."""

    @abstractmethod
    def describe(self) -> Row:
        """The record's "machine" and "versions"."""

    def refusal(self, kernel: str, hidden: int, dtype: torch.dtype, precision: str) -> str | None:
        """Returns the reason why a kernel cannot serve, or None."""
        return registry.get(kernel).refusal(Call(describe(self.device), dtype, hidden, precision))

    @abstractmethod
    def finish(self) -> None:
        """Waits until the device has done everything; raises if something it did went wrong."""

    @abstractmethod
    def time_ms(self, figure: str, work: Work, lead_ms: float = 0.0) -> float:
        """One figure of one run: "gpu_ms" of the device alone, "eager_ms" by the wall, "graph_ms" of a replay.

        `lead_ms` is how long the CPU takes to ask for the work.
        """

    @abstractmethod
    def capture(self, work: Work) -> Work:
        """The work as a CUDA graph: what is returned replays it."""

    @abstractmethod
    def peak_mib(self, work: Work) -> float | None:
        """Memory that the work takes beyond what there was before it, in MiB."""

    @abstractmethod
    def forget(self) -> None:
        """Gives memory back between two jobs."""


class Gpu(Machine):
    """A CUDA device."""

    has_ptx = True
    fewest_rounds = 5

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU here; --cpu-smoke tries the command on a CPU")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)

    def describe(self) -> Row:
        found = self._properties
        machine = {
            "card": found.name,
            "capability": [found.major, found.minor],
            "processors": found.multi_processor_count,
            "memory_gib": found.total_memory / 2**30,
            "driver": _driver(),
        }
        return {"machine": machine | _cpu(), "versions": _versions()}

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def time_ms(self, figure: str, work: Work, lead_ms: float = 0.0) -> float:
        if figure == "eager_ms":
            return _wall_ms(self, work)
        return gpu_time_ms(work, lead_ms)

    def capture(self, work: Work) -> Work:
        return capture(work, self.device)

    def peak_mib(self, work: Work) -> float | None:
        self.finish()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        self.finish()
        # What takes no memory has no figure.
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20 or None

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class Cpu(Machine):
    """The CPU, with Triton's interpreter: by the wall clock throughout, and a capture is the work itself."""

    device = torch.device("cpu")
    has_ptx = False
    fewest_rounds = 2

    def describe(self) -> Row:
        machine = dict.fromkeys(("card", "capability", "processors", "memory_gib", "driver"))
        return {"machine": machine | _cpu(), "versions": _versions()}

    def finish(self) -> None:
        """Everything is done already."""

    def time_ms(self, figure: str, work: Work, lead_ms: float = 0.0) -> float:
        return _wall_ms(self, work)

    def capture(self, work: Work) -> Work:
        work()
        return work

    def peak_mib(self, work: Work) -> float | None:
        work()
        return None

    def forget(self) -> None:
        gc.collect()


def _wall_ms(machine: Machine, work: Work) -> float:
    machine.finish()
    start = time.perf_counter()
    work()
    machine.finish()
    return 1e3 * (time.perf_counter() - start)


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi: no answer"
    return answer.stdout.strip() if answer.returncode == 0 else f"nvidia-smi: exit code {answer.returncode}"


def _cpu() -> Row:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "cpu_cores": os.cpu_count()}


def _versions() -> Row:
    import bigru

    found = {"bigru": bigru.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
