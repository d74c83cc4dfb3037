"""The choice of a backend for a call; a kernel's module is imported when it is first asked for."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bigru.kernels.backends import BACKENDS, KERNELS
from bigru.kernels.config import Call
from bigru.kernels.kernel import Kernel
from bigru.kernels.proven import Proofs, hint
from bigru.kernels.proven import proofs as proofs_here

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


class Choice(NamedTuple):
    """The backend of a call."""

    backend: str
    """Never "auto"."""
    refusal: str | None = None
    """Why it cannot serve the call."""
    warning: str | None = None
    why: str = "asked for by name"


def choose(backend: str, call: Call, kernels: Sequence[Kernel] | None = None, proofs: Proofs | None = None) -> Choice:
    """Chooses the backend of a call.

    Args:
        backend: "auto", or the name of a public kernel.
        call: the call to serve.
        kernels: the kernels that "auto" may take, in order; by default those that `KERNELS` lists for the device.
        proofs: what is proven; by default what `bigru.kernels.proven` finds for the device.
    """
    if backend != "auto":
        return Choice(backend, get(backend).refusal(call))
    if kernels is None:
        kernels = [get(name) for name, entry in KERNELS.items() if entry.auto == call.device.type]
        proofs = proofs or (proofs_here(call.device) if kernels else None)
        if proofs is None and call.device.type == "cuda":
            hint(call.device)
    known = proofs.of(call) if proofs else None
    why = known[1] if known else "no record says anything of such a call"
    if proofs:
        kernels = [kernel for kernel in kernels if kernel.name not in proofs.wrong]
    if known:
        kernels = [kernel for name in known[0] for kernel in kernels if kernel.name == name]
    reason = None
    for kernel in kernels:
        reason = kernel.refusal(call)
        if reason is None and (known or kernel.is_proven(call)):
            return Choice(kernel.name, why=why if known else kernel.rule)
        reason = reason or f"no recorded run has proven it on this GPU; backend={kernel.name!r} takes it all the same"
    if known and not reason:
        reason = why
    # cuDNN's products of fp32 numbers may be TF32, which GPUs have from compute capability 8.0 on.
    if reason and call.accurate and torch.backends.cudnn.allow_tf32 and call.device.capability >= (8, 0):
        warning = (
            f'"auto" leaves the fused kernel alone ({reason}); ATen\'s GRU serves, and its products may be TF32 '
            "because torch.backends.cudnn.allow_tf32 is on"
        )
        return Choice("torch", None, warning, why)
    return Choice("torch", why=why)
