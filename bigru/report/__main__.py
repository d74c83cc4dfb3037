"""`python -m bigru.report RUN`: writes the document and the pictures of a finished run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bigru.report.document import write_files
from bigru.report.record import RunError, read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Reports the run named on the command line; returns 0, or 2 for a folder that cannot be reported."""
    parser = argparse.ArgumentParser(
        prog="python -m bigru.report", description="Write results_bigru.md and its pictures from a run folder alone."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, e.g. runs/20261123_224500")
    parser.add_argument("--out", type=Path, help="folder for the document and plots/ (default: the parent of RUN)")
    options = parser.parse_args(argv)
    try:
        written = write_files(read_run(options.run), options.out)
    except (RunError, OSError) as error:
        print(f"bigru.report: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
