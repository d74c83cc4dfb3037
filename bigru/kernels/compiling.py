"""Marks for torch.compile, set without importing it: torch._dynamo takes longer to import than the rest of PyTorch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates as torch.compiler.disable does, which is called no earlier than a compiler is there."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        disabled: list[Callable[P, R]] = []

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        return call

    return decorate


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates as torch.compiler.assume_constant_result does: compilers call it once and keep what it returns."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
