"""The choice of a backend for a module's call: `registry.choose` of what the call looks like."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from bigru.kernels import proven
from bigru.kernels.compiling import constant
from bigru.kernels.config import Call, describe, dtype_of_call
from bigru.kernels.registry import Choice, choose
from bigru.kernels.transforms import transformed, vmapped

if TYPE_CHECKING:
    from bigru.kernels.gru import BiGRU


def choice_of(gru: BiGRU, input: Tensor | PackedSequence) -> Choice:
    """Returns the backend that serves a call, and why it.

    Raises:
        RuntimeError: the backend asked for cannot serve it; the message says why.
    """
    if gru.backend in ("torch", "reference"):
        return Choice(gru.backend)
    data = input.data if isinstance(input, PackedSequence) else input
    varlen = data is not input
    if gru.backend == "auto" and transformed():
        # ATen's GRU has no rule for vmap and none for packed sequences, cuDNN's no second derivative and no forward
        # mode, an operator none of all.
        aten = data.device.type == "cpu" and not varlen and not torch.compiler.is_compiling() and not vmapped()
        return Choice("torch" if aten else "reference")
    if gru.backend == "auto" and data.device.type == "cpu" and forward_ad._current_level >= 0:
        return Choice("torch")  # which has a derivative in forward mode
    dtype = dtype_of_call(data.dtype, data.device.type)
    steps, batch = None, None
    if gru.backend == "auto" and not torch.compiler.is_compiling():
        if isinstance(input, PackedSequence):
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        elif data.dim() == 2:
            steps, batch = len(data), 1
        else:
            batch, steps = data.shape[:2] if gru.batch_first else (data.shape[1], data.shape[0])
    backend, refusal, warning, why = _choose(
        gru.backend, data.device, dtype, gru.hidden_size, gru.precision, varlen, steps, batch
    )
    if refusal is not None:
        raise RuntimeError(f"backend {backend!r} cannot serve this call: {refusal}")
    if warning is not None:
        warnings.warn(warning, stacklevel=4)
    return Choice(backend, why=why)


# Compilers need not look inside: the answer depends on nothing that changes while the program runs.
@constant
def _choose(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    precision: str,
    varlen: bool,
    steps: int | None,
    batch: int | None,
) -> tuple[Any, ...]:
    # A call may take microseconds. Where a GPU's "auto" finds no kernel it heeds torch.backends, which may change.
    about = backend, device, dtype, hidden, precision, varlen, steps, batch, torch.get_num_threads()
    choice = _remembered(*about)
    if choice.backend == "torch" and backend == "auto" and device.type != "cpu":
        choice = _ask(*about)
    return tuple(choice)


def _ask(backend: str, device: torch.device, *about: Any) -> Choice:
    return choose(backend, Call(describe(device), *about[:-1]))


_remembered = functools.lru_cache(maxsize=1024)(_ask)


def forget() -> None:
    """Forgets what was read and chosen, as after a new proof."""
    for function in (proven.proofs, proven.known, _remembered):
        function.cache_clear()
