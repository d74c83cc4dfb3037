"""What all commands share: how they are found, started and ended, the extra they need, the terminal they write to.

Exit codes: 0; 1 for a run that diverged, or a part of what was asked for that cannot be done; 2 for what the user can
mend; 128 and the signal's number for an interruption. What goes wrong is one line on stderr, `bigru.NAME: ...`.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib.util import find_spec
from typing import Concatenate, ParamSpec

from bigru.files import ESCAPE, shell_line

P = ParamSpec("P")

log = logging.getLogger("bigru.train")

COMMANDS = {
    "train": ("bigru.train", "train the forecaster, score it and write the run's document"),
    "predict": ("bigru.predict", "forecast the motion of both hands in clips"),
    "compare": ("bigru.report.compare", "set finished runs side by side"),
    "report": ("bigru.report.__main__", "write a finished run's document again"),
    "data": ("bigru.data.__main__", "look through a dataset or a clip before anything is trained on it"),
    "prove": ("bigru.proof.command", 'check and time this machine\'s kernels, for "auto" to choose among'),
}
"""Name -> the module whose `main` it is, and what it does."""
FORECASTER = ("h5py", "matplotlib", "safetensors", "tabulate", "tqdm", "tyro", "yaml")
"""Modules that the extra `forecaster` brings."""


class CommandError(Exception):
    """What a command tells in a line before it ends with the exit code `code`."""

    code = 2


def ending(name: str) -> Callable[[Callable[Concatenate[Sequence[str], P], int]], Callable[..., int]]:
    """Returns a decorator for a command's main, which takes the arguments; it gives every command the same end."""

    def decorate(main: Callable[Concatenate[Sequence[str], P], int]) -> Callable[..., int]:
        @wraps(main)
        def ended(argv: Sequence[str] | None = None, *args: P.args, **kwargs: P.kwargs) -> int:
            arguments = sys.argv[1:] if argv is None else list(argv)
            try:
                for before, argument in zip(["nothing", *arguments], arguments, strict=False):
                    if not argument or (argument.startswith("--") and argument.endswith("=")):
                        raise CommandError(
                            f"expected no empty argument, as a variable that is not set leaves one, got one at "
                            f"{argument or before}"
                        )
                code = main(arguments, *args, **kwargs)
                sys.stdout.flush()
                return code
            except BrokenPipeError:
                # The reader, such as head, has had enough; nor is what is left in the buffer to be written at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return 128 + 13
            except KeyboardInterrupt as error:
                code, message = 128 + getattr(error, "signal", signal.SIGINT), "interrupted"
            except CommandError as error:
                code, message = error.code, str(error)
            except OSError as error:
                code, message = 2, str(error)
            print(f"bigru.{name}: {message}", file=sys.stderr)
            return code

        return ended

    return decorate


def training_line(*arguments: str | os.PathLike[str]) -> str:
    """Returns a training command as the reader's shell takes it: by nox, where nox started this one."""
    return shell_line([*os.environ.get("BIGRU_TRAIN", "python -m bigru.train").split(), *arguments])


@contextmanager
def log_to(handler: logging.Handler) -> Iterator[logging.Handler]:
    """Sends the log's lines to a handler too, for as long as the block runs."""
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
        handler.close()


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 where the extra that it needs is not installed."""
    prepare_console()
    try:
        if name != "prove":
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
        said = (
            f"{name} needs the extra forecaster (in a clone: pip install '.[forecaster]'): no {', '.join(missing)} here"
        )
        if sys.argv[:1] == ["-m"]:  # `python -m` looks for the command in a package that is being imported
            print(said, file=sys.stderr)
            raise SystemExit(2)
        raise ModuleNotFoundError(said, name=missing[0])


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
train, predict, compare, report, data, prove = (partial(run, name) for name in COMMANDS)
