"""Describes the machine and its software, and measures one candidate beside one rival on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bigru.kernels.proven import processor
from bigru.kernels.record import NN_GRU, Row
from bigru.proof.timing import Work, capture_graph, compare, gpu_ms, interleaved, settled_ms, wall_ms
from bigru.proof.workloads import Case, Make, Refused, errors, make_layer, products, verdict

Clocks = Mapping[str, Callable[[Work], float]]
WALL: Clocks = {"wall": settled_ms}
GPU: Clocks = {"wall": wall_ms, "gpu": gpu_ms, "graph": gpu_ms}
TRIAL: Clocks = dict.fromkeys(GPU, wall_ms)
"""For the code of a GPU on a CPU, where a captured work is the work itself."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Returns the `machine` of a record."""
    if device.type != "cuda":
        return {"name": processor(), "cores": os.cpu_count()}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "capability": [card.major, card.minor],
        "processors": card.multi_processor_count,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "driver, clocks": _ask_driver(),
        "cpu": processor(),
        "cores": os.cpu_count(),
    }


def describe_versions(*others: str) -> dict[str, str | None]:
    """Returns the `versions` of a record; None for a package that is not there."""
    import bigru

    found: dict[str, str | None] = {"bigru": bigru.__version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for name in ("triton", "numpy", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def measure(
    case: Case,
    candidate: str,
    device: torch.device,
    seconds: float,
    *,
    rival: str = NN_GRU,
    modes: tuple[str, ...] = ("forward", "training"),
    clocks: Clocks = WALL,
    fewest: int = 5,
    made: Make = make_layer,
    capture: Callable[[Work, torch.device], Work] = capture_graph,
) -> list[Row]:
    """Proves a candidate right at a case and times it beside a rival: a row for each mode and clock.

    Args:
        case: what is computed.
        candidate, rival: names as `benchmarks.workloads.make` takes them.
        device: where.
        seconds: for the rounds of each row.
        modes: of the case; those that its group lacks are left out.
        clocks: by name; "graph" times the replay of a CUDA graph.
        fewest: rounds that are run however long they take.
        made: makes both sides.
        capture: makes the replay of a work.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else None
    about: dict[str, Any] = vars(case) | {"candidate": candidate, "rival": rival, "threads": threads}
    modes = tuple(mode for mode in modes if case.group != "training step" or mode == "training")

    def without(status: str, why: str) -> list[Row]:
        return [Row(**about, mode=mode, status=status, message=why) for mode in modes]

    with products(case.precision):
        try:
            ours, theirs = made(candidate, case, device), made(rival, case, device)
        except Refused as why:
            return without("refused", str(why))
        about["candidate"] = ours.name
        found = errors(ours, made(NN_GRU, case, device))
        if wrong := verdict(found, case):
            return without("failed", wrong)
        rows = []
        for mode in modes:
            works = {"ours": ours.works[mode], "rival": theirs.works[mode]}
            for clock, time_ms in clocks.items():
                row = about | {"mode": mode, "clock": clock}
                if clock == "graph":
                    try:
                        works = {name: capture(work, device) for name, work in works.items()}
                    except Exception as error:  # Whatever a capture raises costs this row alone.
                        message = f"no graph: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
                        rows.append(Row(**row, status="refused", message=message))
                        continue
                times = interleaved(works, seconds, time_ms, fewest)
                rows.append(Row(**row, **compare(times["ours"], times["rival"]), error=max(found.values())))
    return rows


def profile(
    case: Case, candidate: str, device: torch.device, most: int = 12, made: Make = make_layer
) -> list[tuple[str, int, float]]:
    """Returns the GPU's kernels in one training pass of a candidate: name, calls, milliseconds; longest first."""
    with products(case.precision):
        work = made(candidate, case, device).works["training"]
        work()
        with torch.profiler.profile() as trace:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
    of_gpu = device.type == "cuda"
    rows = [
        (entry.key[:120], entry.count, (entry.self_device_time_total if of_gpu else entry.self_cpu_time_total) / 1e3)
        for entry in trace.key_averages()
    ]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])[:most]


def _ask_driver() -> str | None:
    """Returns the driver's version and the card's present and highest clock."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader", "-i", "0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi: no answer"
    return answer.stdout.strip() if answer.returncode == 0 else f"nvidia-smi: exit code {answer.returncode}"
