"""Lists the commands: `python -m bigru`."""

from __future__ import annotations

import sys

from bigru import __version__
from bigru.command import COMMANDS


def main() -> int:
    """Prints the commands, or with --version the version; returns 0, or 2 for anything else."""
    if sys.argv[1:] == ["--version"]:
        print(f"bigru {__version__}")
        return 0
    width = max(map(len, COMMANDS))
    lines = [f"  python -m bigru.{name:{width}}  {description}" for name, (_, description) in COMMANDS.items()]
    print(f"bigru {__version__}: commands, each with --help; bigru-train and so on are the same:", *lines, sep="\n")
    return 0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
