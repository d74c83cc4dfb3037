"""Pieces of Markdown and numbers that the documents are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tabulate import tabulate


def blocks(*parts: str) -> str:
    """Paragraphs, headings, tables and lists with an empty line between each two."""
    return "\n\n".join(parts)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A pipe table of cells already formatted: the first `left` columns to the left, the others to the right."""
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def plain(text: str) -> str:
    """Free text on one line, with what Markdown would read as markup escaped."""
    return re.sub(r"[\\`*<>|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", " ".join(text.split()))


def code(text: str) -> str:
    """Text on one line in a fixed-width face."""
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, whole ones never cut; a dash for NaN."""
    if math.isnan(value):
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    # Rounded first, so that 9.996 becomes 10.0 and not 10.00.
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def under(text: str, command: str) -> str:
    """What stands in small print beneath a table or a plot: where its figures come from, and what prints them again."""
    return f"<sub>{plain(text)}; {code(command)}</sub>"
