"""How a job tells what it found, part by part, and what becomes of a part that raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu_record import Row
from benchmarks.machine import Machine


class Report:
    """The answers of one job.

    Args:
        parts: the rows of each part, still without what is found out.
        machine: is asked whether it still works after a part has raised.
        say: sends one answer.
    """

    def __init__(self, parts: dict[str, list[Row]], machine: Machine, say: Callable[[dict[str, Any]], object]) -> None:
        self._parts, self._machine, self.say = parts, machine, say
        self.open = list(parts)
        """Parts that have not been reported."""

    def finish(self, part: str, rows: list[Row]) -> None:
        self.open.remove(part)
        self.say({"part": part, "rows": [_plain(row) for row in rows]})

    def together(self) -> None:
        """From here on all open parts run in turn."""
        self.say({"start": None})

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Runs one part: an exception becomes the status of its rows. One that leaves the device dead goes on up."""
        self.say({"start": part})
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            if part in self.open:
                self.finish(part, [row | {"status": "failed", "message": message} for row in self._parts[part]])
            # After an illegal access every later call fails; then this process ends, and a new one takes over.
            self._machine.finish()


def _plain(row: Row) -> Row:
    """A row with numbers that JSON has."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in row.items()}
