"""The operators' formulas for torch.utils.flop_counter, which has none for an operator that it does not know."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def register_flop_formulas() -> None:
    """Registers the formulas if torch.utils.flop_counter is imported; it imports triton, so it is left to its users.

    A counter copies the table when it is made, and may have been made before this: those in use get them too.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    for operator, formula in (
        (torch.ops.bigru.gru_forward, _forward_flops),
        (torch.ops.bigru.gru_backward, _backward_flops),
    ):
        if operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():
            registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if registry is not None:
                registry.setdefault(operator, flop_counter.flop_registry[operator])


def _forward_flops(gi: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    """Of the products with W_hh (3H, H), each a multiplication and an addition; those of the inputs are ATen's."""
    steps, batch, directions, gates = gi
    return 2 * steps * batch * directions * gates * w_hh[-1]


def _backward_flops(dy: Shape | None, dh_n: Shape | None, y: Shape, *_: Any, **__: Any) -> int:
    """As many, with W_hh's transpose; the products for the weights' gradients are ATen's."""
    steps, batch, directions, hidden = y
    return 2 * steps * batch * directions * 3 * hidden * hidden
