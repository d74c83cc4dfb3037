"""What all commands share: how they are found and started, the extra that they need, and the terminal they write to."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from bigru.files import ESCAPE

COMMANDS = {
    "train": ("bigru.training.command", "train the forecaster, score it and write the run's document"),
    "predict": ("bigru.model.prediction", "forecast the motion of both hands in clips"),
    "compare": ("bigru.report.compare", "set finished runs side by side"),
    "report": ("bigru.report.__main__", "write a finished run's document again"),
    "data": ("bigru.data.__main__", "look through a dataset or a clip before anything is trained on it"),
}
"""Name -> the module whose `main` it is, and what it does."""
FORECASTER = ("h5py", "matplotlib", "safetensors", "tabulate", "tqdm", "tyro", "yaml")
"""Modules that the extra `forecaster` brings."""


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 where the extra that it needs is not installed."""
    prepare_console()
    try:
        require_forecaster(f"bigru.{name}")
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(COMMANDS[name][0]).main(argv)
    except KeyboardInterrupt:
        # While modules are imported, which takes seconds.
        print(f"bigru.{name}: interrupted", file=sys.stderr)
        return 130
    return code


def require_forecaster(name: str) -> None:
    """Raises ModuleNotFoundError, saying in one line how to install it, unless the extra `forecaster` is there.

    Args:
        name: of the module or command that needs it.
    """
    if missing := [module for module in FORECASTER if find_spec(module) is None]:
        raise ModuleNotFoundError(
            f"{name} needs the extra forecaster, pip install 'bigru[forecaster]': no {', '.join(missing)} here",
            name=missing[0],
        )


def prepare_console() -> None:
    """Makes stdout and stderr take any text: what their encoding lacks is escaped; closed ones become /dev/null."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            # Closed (`2>&-`), or pythonw. The number too is taken, which the next file opened would get otherwise.
            nothing = os.open(os.devnull, os.O_WRONLY)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ESCAPE)


# The console scripts: bigru-train and so on.
train, predict, compare, report, data = (partial(run, name) for name in COMMANDS)
