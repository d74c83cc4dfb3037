"""Writes PERFORMANCE.md and its plots from the records of the benchmarks: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.performance import write_performance
from bigru.report.record import RunError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 a record is broken and left out, 2 nothing was written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write the performance document and its plots from the records of the benchmarks.",
        epilog="Exits with 1 if a record is broken: it is left out, and named here and in the document.",
    )
    folder, document = Path("benchmarks/results"), Path("PERFORMANCE.md")
    parser.add_argument("--results", type=Path, default=folder, help="folder of records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=document, help="the document (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        written, results = write_performance(options.results, options.out)
    except (RunError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    for name, reason in results.broken.items():
        print(f"benchmarks.report: {options.results / name}: broken, left out: {reason}", file=sys.stderr)
    return 1 if results.broken else 0


if __name__ == "__main__":
    sys.exit(main())
