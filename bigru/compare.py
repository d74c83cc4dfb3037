"""The comparing command: `python -m bigru.compare RUN RUN ...` sets finished runs side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bigru.command import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run("compare", argv)


if __name__ == "__main__":
    sys.exit(main())
