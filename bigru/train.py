"""The training command: `python -m bigru.train` trains the forecaster, scores it and writes results_bigru.md.

`torchrun --nproc-per-node N -m bigru.train ...` trains in N processes: the batch is the same, divided among them.
What a run leaves in its folder: `bigru.training.run`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # before the imports that need the extra
    from bigru.command import run

    sys.exit(run("train"))

from bigru.arguments import Arguments, parse_arguments
from bigru.command import ending, log_to

if TYPE_CHECKING:
    from bigru.training.run import Parts


def main(argv: Sequence[str] | None = None, parts: Parts | None = None) -> int:
    """Runs the command line and returns its exit code, as `bigru.command` lists them."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
            # Of several processes the first speaks for all.
            nobody = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nobody))
            stack.enter_context(redirect_stderr(nobody))
        return _start(argv, parts)


@ending("train")
def _start(argv: Sequence[str], parts: Parts | None) -> int:
    console = logging.StreamHandler()
    # What it says of a file of settings is said as the run's lines are.
    with log_to(console):
        _carry_out(parse_arguments(argv), parts, console)
    return 0


def _carry_out(arguments: Arguments, parts: Parts | None, console: logging.Handler) -> None:
    # Only now: the help and a mistake in the options need not wait for torch.
    from bigru.training.distributed import joined
    from bigru.training.run import Parts, resume, train
    from bigru.training.signals import interrupt, on_signals
    from bigru.training.sweep import sweep_modalities

    parts = Parts() if parts is None else parts
    with on_signals(interrupt), joined():
        if arguments.resume is not None:
            resume(arguments.resume, arguments.changes, parts)
        elif arguments.sweep == "modalities":
            # Five runs' lines are too many; their logs hold them.
            console.setLevel(logging.WARNING)
            sweep_modalities(arguments.settings, parts)
        else:
            train(arguments.settings, parts)
