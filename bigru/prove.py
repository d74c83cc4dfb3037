"""Proves kernels on this machine: `python -m bigru.prove`, or `bigru.prove()`; see `bigru.proof.command`."""

from __future__ import annotations

import sys
from types import ModuleType

from bigru.command import run
from bigru.kernels.record import Record
from bigru.proof.command import prove


class _Callable(ModuleType):
    """So that `bigru.prove()` means the function also once the command's module is imported."""

    def __call__(self, *arguments: str) -> Record:
        return prove(*arguments)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(run("prove"))
