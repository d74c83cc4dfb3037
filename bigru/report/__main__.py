"""The documents: `python -m bigru.report RUN` of a finished run, `python -m bigru.report performance` of the records.

The word `performance` in front chooses the second; a run folder of that name is `./performance`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigru.report.document import write_files
from bigru.report.fields import RunError
from bigru.report.performance import write_performance
from bigru.report.record import read_run

PERFORMANCE = "performance"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 a record is broken and left out, 2 nothing was written."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = performance if arguments[:1] == [PERFORMANCE] else run
    try:
        return command(arguments)
    except (RunError, OSError) as error:
        print(f"bigru.report: {error}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str]) -> int:
    """Reports the run that the arguments name."""
    parser = argparse.ArgumentParser(
        prog="python -m bigru.report",
        description="Write results_bigru.md and its pictures from a run folder alone.",
        epilog=f"'python -m bigru.report {PERFORMANCE} --help': the document of the benchmarks; a run folder of that "
        f"name is ./{PERFORMANCE}",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, e.g. runs/20261123_224500")
    parser.add_argument("--out", type=Path, help="folder for the document and plots/ (default: the parent of RUN)")
    options = parser.parse_args(arguments)
    print(*write_files(read_run(options.run), options.out), sep="\n")
    return 0


def performance(arguments: Sequence[str]) -> int:
    """Writes the performance document; names on stderr what is broken and left out of it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bigru.report {PERFORMANCE}",
        description="Write the performance document and its plots from the records of the benchmarks.",
        epilog="Exits with 1 if a record is broken: it is left out, and named here and in the document.",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        default=Path("benchmarks/results"),
        help="folder of records (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("PERFORMANCE.md"),
        help="the document; plots go to docs/images/performance in its folder (default: %(default)s)",
    )
    options = parser.parse_args(arguments[1:])
    written, results = write_performance(options.results, options.out)
    print(*written, sep="\n")
    for name, reason in results.left_out.items():
        print(f"bigru.report: {options.results / name}: left out: {reason}", file=sys.stderr)
    for name, reason in results.broken.items():
        print(f"bigru.report: {options.results / name}: broken, left out: {reason}", file=sys.stderr)
    return 1 if results.broken else 0


if __name__ == "__main__":
    sys.exit(main())
