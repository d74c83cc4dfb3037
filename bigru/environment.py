"""The device of a run, and the versions that its figures depend on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from bigru import __version__
from bigru.config import ConfigError
from bigru.kernels.cpu import KERNEL
from bigru.kernels.registry import Choice


def pick_device(name: str) -> torch.device:
    """Returns the device of that name; `auto` is a GPU if there is one.

    Raises:
        ConfigError: there is no such device here, or it is neither a CPU nor a GPU that speaks CUDA.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type in ("cpu", "cuda"):
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    raise ConfigError(f"device: expected auto, cpu or cuda, got {name!r}")


def set_threads(threads: int | None, device: torch.device) -> None:
    """Sets the CPU's threads; None: one where the CPU computes, unless OMP_NUM_THREADS says otherwise.

    In networks this small a second thread gains a fifth on an idle machine, and loses most of the speed on a busy one.
    """
    if threads is None and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """Returns the GPU's name, or the CPU, how many threads it runs, and what its kernel was built for."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    built = KERNEL.instructions.replace("none", "not built")
    plural = "s" if threads > 1 else ""
    return f"CPU ({threads} thread{plural}; CPU kernel: {built})" if device.type == "cpu" else str(device)


def describe_environment(device: torch.device, choice: Choice, precision: str) -> dict[str, str | None]:
    """Returns device, backend and versions, as summary.json holds them; Triton is None where it is not installed."""
    triton = None
    with suppress(PackageNotFoundError):
        triton = version("triton")
    return {
        "device": device_name(device),
        "backend": choice.backend,
        "why": choice.why,
        "precision": precision,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton,
        "numpy": np.__version__,
        "bigru": __version__,
        "platform": platform.platform(),
    }
