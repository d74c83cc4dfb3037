"""JSON that names the place of whatever is missing, mistyped or torn in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigru.report.record import RunError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; raises RunError, naming the file."""
    # Broken bytes become broken JSON.
    return parse_object(str(path), path.read_text(encoding="utf-8", errors="replace"))


def parse_object(where: str, text: str) -> dict[str, Any]:
    """The JSON object that a text is; raises RunError, naming the place."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Fields:
    """A JSON object that knows where it was read, so that a missing or mistyped entry is named in full."""

    where: str
    values: Mapping[str, Any]

    def _get(self, name: str, kinds: tuple[type, ...], expected: str) -> Any:
        if name not in self.values:
            raise RunError(f"{self.where}: {name} is missing")
        value = self.values[name]
        # bool is an int to Python, and neither a count nor an error to us.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise RunError(f"{self.where}: {name} should be {expected}, got {value!r}")
        return value

    def number(self, name: str) -> float:
        """A number; null is NaN, which strict JSON cannot say otherwise."""
        value = self._get(name, (int, float, type(None)), "a number")
        return math.nan if value is None else float(value)

    def count(self, name: str) -> int:
        value = self._get(name, (int,), "a whole number, 0 or more")
        if value < 0:
            raise RunError(f"{self.where}: {name} should be a whole number, 0 or more, got {value!r}")
        return value

    def text(self, name: str) -> str:
        return self._get(name, (str,), "a string")

    def text_or_none(self, name: str) -> str:
        """A string; null reads `none`."""
        return self._get(name, (str, type(None)), "a string or null") or "none"

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers, null as NaN."""
        listed = self._get(name, (list,), "a list of numbers")
        return tuple(Fields(f"{self.where}: {name}", {f"[{i}]": v}).number(f"[{i}]") for i, v in enumerate(listed))

    def flag(self, name: str) -> bool:
        return self._get(name, (bool,), "true or false")

    def inside(self, name: str) -> Fields:
        return Fields(f"{self.where}: {name}", self._get(name, (dict,), "an object"))

    def objects(self, name: str) -> list[Fields]:
        listed = self._get(name, (list,), "a list of objects")
        if not all(isinstance(value, dict) for value in listed):
            raise RunError(f"{self.where}: {name} should be a list of objects, got {listed!r}")
        return [Fields(f"{self.where}: {name}[{i}]", value) for i, value in enumerate(listed)]

    def counts(self, name: str) -> dict[str, int]:
        """An object of counts, its keys free."""
        inner = self.inside(name)
        return {key: inner.count(key) for key in inner.values}
