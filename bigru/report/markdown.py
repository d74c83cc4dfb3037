"""Pieces of Markdown that the documents are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from bigru.files import printable


def blocks(*parts: str) -> str:
    """Joins paragraphs, headings, tables and lists with an empty line between each two."""
    return "\n\n".join(parts)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Returns a pipe table of formatted cells: the first `left` columns to the left, the others to the right."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    # A bar ends a cell, even within code.
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def listed(words: Sequence[str]) -> str:
    """Returns `a`, `a and b` or `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plain(text: str) -> str:
    """Returns free text on one line, with what Markdown would read as markup escaped."""
    text = printable(" ".join(text.split()))
    return re.sub(r"[\\`*<>|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


def code(text: str) -> str:
    """Returns text on one line in a fixed-width face."""
    text = printable(" ".join(text.split()))
    return f"`` {text} ``" if "`" in text else f"`{text}`"
