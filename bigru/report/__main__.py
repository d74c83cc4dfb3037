"""The reporting command: `python -m bigru.report RUN` writes the document of a finished run.

`python -m bigru.report performance` is `python -m benchmarks.report`; a run folder of that name is `./performance`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from bigru.command import CommandError, ending, prepare_console
from bigru.files import printable, user_path
from bigru.report.document import write_files
from bigru.report.record import read_run

PERFORMANCE = "performance"


@ending("report")
def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns its exit code: 0, or 2 where nothing was written."""
    if arguments[:1] == [PERFORMANCE]:
        return performance(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bigru.report",
        description="Write results_bigru.md and its pictures from run folders alone.",
        epilog=f"'python -m bigru.report {PERFORMANCE} --help': the document of the benchmarks; a run folder of that "
        f"name is ./{PERFORMANCE}",
    )
    parser.add_argument(
        "run", type=user_path, metavar="RUN", help="folder of a finished run: runs/20261123_224500, say"
    )
    parser.add_argument("--out", type=user_path, help="folder for the document and plots/ (default: the parent of RUN)")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="bigru.report: %(message)s")
    print(*map(printable, write_files(read_run(options.run), options.out)), sep="\n")
    return 0


def performance(arguments: Sequence[str]) -> int:
    """Runs `python -m benchmarks.report`, which only a checkout has."""
    try:
        from benchmarks.report import main as write
    except ImportError as error:
        raise CommandError("the installed package lacks the benchmarks: run this in a checkout") from error
    return write(arguments)


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
