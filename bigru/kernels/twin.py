"""Modules of one class made of another's: nn.GRU to `BiGRU` and back share all that an RNNBase holds."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.RNNBase)


def unlike_bigru(gru: nn.Module) -> TypeError | ValueError | None:
    """Returns the error of a module that is to become a BiGRU and cannot, or None."""
    if type(gru) is not nn.GRU:
        return TypeError(f"gru: expected a torch.nn.GRU itself, got {type(gru).__name__}")
    if not gru.bidirectional:
        return ValueError("gru: expected bidirectional=True, got False")
    if gru.proj_size:
        return ValueError(f"gru: expected no proj_size, got {gru.proj_size}")
    if name := own_callable(gru):
        return TypeError(f"gru: expected a torch.nn.GRU without a {name} of its own: convert first, wrap after")
    return None


def own_callable(module: nn.Module) -> str | None:
    """Returns the name of a callable that a module's instance holds, such as a `forward` of a wrapper, or None.

    It was made for the module's class, whose code it would go on running in another. A compiled call is torch's own
    and can be made anew: it does not count.
    """
    held = (name for name, value in vars(module).items() if callable(value) and name != "_compiled_call_impl")
    return next(held, None)


def twin(module: nn.RNNBase, of: type[Module], **attributes: str) -> Module:
    """Returns a module of another class that holds what this one holds but a compiled call, in its own containers."""
    other = copy.copy(module)
    vars(other).pop("_compiled_call_impl", None)
    for name, value in vars(other).items():
        if isinstance(value, dict | list):
            vars(other)[name] = copy.copy(value)
    vars(other).update(attributes)
    other.__class__ = of
    return other  # type: ignore[return-value]
