"""The forecasting command: `python -m bigru.predict --weights FILE CLIP [CLIP ...]`; see bigru.model.prediction."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bigru.command import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run("predict", argv)


if __name__ == "__main__":
    sys.exit(main())
