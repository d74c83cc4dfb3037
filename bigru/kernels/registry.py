"""The choice of a backend for a call; a kernel's module is imported when it is first asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch

from bigru.kernels.backends import BACKENDS, KERNELS
from bigru.kernels.config import Call
from bigru.kernels.kernel import Kernel

PRECISIONS = ("fp32", "tf32")
"""The values of `BiGRU`'s `precision`."""


def check_options(backend: str = "auto", precision: str = "fp32") -> None:
    """Raises ValueError for an unknown backend or precision."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")


class Missing(Kernel):
    """Stands for a kernel that needs a package which is not installed."""

    def __init__(self, name: str, package: str | None) -> None:
        self.name, self.package = name, package

    def refusal(self, call: Call) -> str:
        """Returns the name of the missing package."""
        return f"{self.package} is not installed"


@functools.cache
def get(name: str) -> Kernel:
    """Returns a kernel by name.

    Raises:
        ValueError: no kernel has this name.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {name!r}")
    try:
        kernel: Kernel = importlib.import_module(KERNELS[name].module).KERNEL
    except ModuleNotFoundError as missing:
        return Missing(name, missing.name)
    return kernel


def choose(backend: str, call: Call, kernels: Sequence[Kernel] | None = None) -> tuple[str, str | None, str | None]:
    """Chooses the backend of a call.

    Args:
        backend: "auto", or the name of a public kernel.
        call: the call to serve.
        kernels: the kernels that "auto" asks, in order; by default those that `KERNELS` lists for the device.

    Returns:
        The backend's name, never "auto"; the reason why it cannot serve the call, or None; and a warning, or None.
    """
    if backend != "auto":
        return backend, get(backend).refusal(call), None
    if kernels is None:
        kernels = [get(name) for name, entry in KERNELS.items() if entry.auto == call.device.type]
    reason = None
    for kernel in kernels:
        reason = kernel.refusal(call)
        if reason is None and kernel.is_proven(call):
            return kernel.name, None, None
        reason = reason or f"no recorded run has proven it on this GPU; backend={kernel.name!r} takes it all the same"
    # cuDNN's products of fp32 numbers may be TF32, which GPUs have from compute capability 8.0 on.
    if reason and call.accurate and torch.backends.cudnn.allow_tf32 and call.device.capability >= (8, 0):
        warning = (
            f'"auto" leaves the fused kernel alone ({reason}); ATen\'s GRU serves, and its products may be TF32 '
            "because torch.backends.cudnn.allow_tf32 is on"
        )
        return "torch", None, warning
    return "torch", None, None
