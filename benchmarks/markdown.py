"""Numbers and small print of the performance document."""

from __future__ import annotations

import math

from bigru.report.markdown import code, plain


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
