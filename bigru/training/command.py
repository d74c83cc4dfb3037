"""The training command: its arguments, signals and exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from bigru.arguments import parse_arguments
from bigru.config import ConfigError
from bigru.data.windows import NoWindowsError
from bigru.model.weights import CheckpointError
from bigru.report.record import RunError
from bigru.training.distributed import LostProcessError, is_first, joined
from bigru.training.run import Parts, read_data_digest, resume, train
from bigru.training.run_dir import log_to
from bigru.training.signals import interrupt, on_signals
from bigru.training.sweep import sweep_modalities
from bigru.training.trainer import DivergedError

log = logging.getLogger("bigru.train")


def main(argv: Sequence[str] | None = None, parts: Parts = Parts()) -> int:  # noqa: B008
    """Runs the command line and returns its exit code.

    0; 1: diverged, or left alone by another process; 2: the user's to mend; 130 and 143: after SIGINT and SIGTERM.
    """
    first = is_first()
    with ExitStack() as stack:
        if not first:
            # Of several processes the first speaks for all.
            nobody = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nobody))
            stack.enter_context(redirect_stderr(nobody))
        stack.enter_context(log_to(logging.StreamHandler()))
        stack.enter_context(on_signals(interrupt))
        try:
            arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
            with joined():
                if arguments.resume is not None:
                    resume(arguments.resume, arguments.changes, parts)
                elif arguments.sweep == "modalities":
                    sweep_modalities(
                        arguments.settings,
                        partial(train, parts=parts),
                        partial(resume, parts=parts),
                        partial(read_data_digest, parts=parts),
                    )
                else:
                    train(arguments.settings, parts)
            return 0
        except (DivergedError, LostProcessError) as error:
            code, message = 1, str(error)
        except (ConfigError, CheckpointError, NoWindowsError, RunError, OSError) as error:
            code, message = 2, str(error)
        except KeyboardInterrupt as error:
            code, message = 128 + getattr(error, "signal", signal.SIGINT), "interrupted"
    if first:
        print(f"bigru.train: {message}", file=sys.stderr)
    return code
