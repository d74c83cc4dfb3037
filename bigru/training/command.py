"""The training command: its arguments, signals and exit codes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from bigru.arguments import parse_arguments
from bigru.command import ending
from bigru.training.distributed import is_first, joined
from bigru.training.run import Parts, read_data_digest, resume, train
from bigru.training.run_dir import log_to
from bigru.training.signals import interrupt, on_signals
from bigru.training.sweep import sweep_modalities


def main(argv: Sequence[str] | None = None, parts: Parts = Parts()) -> int:  # noqa: B008
    """Runs the command line and returns its exit code, as `bigru.command` lists them."""
    with ExitStack() as stack:
        if not is_first():
            # Of several processes the first speaks for all.
            nobody = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nobody))
            stack.enter_context(redirect_stderr(nobody))
        console = stack.enter_context(log_to(logging.StreamHandler()))
        return _carry_out(argv, parts, console)


@ending("train")
def _carry_out(argv: Sequence[str], parts: Parts, console: logging.Handler) -> int:
    with on_signals(interrupt):
        arguments = parse_arguments(argv)
        with joined():
            if arguments.resume is not None:
                resume(arguments.resume, arguments.changes, parts)
            elif arguments.sweep == "modalities":
                # Five runs' lines are too many; their logs hold them.
                console.setLevel(logging.WARNING)
                sweep_modalities(
                    arguments.settings,
                    partial(train, parts=parts),
                    partial(resume, parts=parts),
                    partial(read_data_digest, parts=parts),
                )
            else:
                train(arguments.settings, parts)
    return 0
