"""What a run has found: rows by section, written as one whole JSON file whenever there is more of them."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SECTIONS = ("correctness", "checks", "timings", "left_out")
"""`left_out` holds the correctness rows and checks for which there was no time."""
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
FIGURES = ("gpu_ms", "eager_ms", "graph_ms")
RIVAL = "nn.GRU"
KERNELS = ("triton", "resident", "cooperative")
LOSS = 0.95
"""nn.GRU's time over ours, below which nn.GRU wins."""
FLOOR_HIDDEN, FLOOR_ROWS = 128, 8
"""What the floors of a step are measured for: H, and batch rows of one program."""


class Budget:
    """The time that the whole run may take; `now` is a clock in seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._start, self._seconds = now, now(), seconds

    def spent(self) -> float:
        return self._now() - self._start

    def left(self) -> float:
        return self._seconds - self.spent()


class Record:
    """The JSON file of one run. Rows may come from several threads."""

    def __init__(self, path: Path, header: Row, spent: Callable[[], float]) -> None:
        self.path = path
        self._spent, self._lock = spent, threading.Lock()
        self.facts: Row = {
            "copy_gb_s": None,
            "launch_us": None,
            "graph_launch_us": None,
            "step_floor_us": {"mufu": {}, "mma": {}},
        }
        self.missing_facts: dict[str, str] = {}
        """Why, by name."""
        self.rows: dict[str, list[Row]] = {section: [] for section in SECTIONS}
        self._content = header
        self.machine: Row = header["machine"]

    def add(self, section: str, rows: list[Row]) -> None:
        """Takes in rows of a section; those of "facts" go to their places among the facts."""
        with self._lock:
            for row in rows:
                if section == "facts":
                    self._add_fact(row)
                    continue
                place = section
                if section == "timings" and row["status"] == "measured":
                    row = row | {"floor_ms": floor_ms(row, self.facts, self.machine)}
                elif section != "timings" and row["status"] == "out of time":
                    place = "left_out"
                self.rows[place].append(row)

    def _add_fact(self, fact: Row) -> None:
        if fact["status"] != "measured":
            self.missing_facts[fact["name"]] = f"{fact['status']}: {fact['message']}"
            return
        *groups, name = fact["name"].split("/")
        place = self.facts
        for group in groups:
            place = place[group]
        place[name] = fact["value"]

    def save(self, complete: bool = False) -> None:
        """Writes everything so far; whoever opens the file finds the last whole state."""
        with self._lock:
            content = self._content | {"complete": complete, "seconds": round(self._spent(), 1), "facts": self.facts}
            content |= (
                {"missing_facts": self.missing_facts} | self.rows | {"proven": self.proven(), "losses": self.losses()}
            )
            write_whole(self.path, content)

    def proven(self) -> list[Row]:
        """The combinations of kernel, H, dtype and precision of which every correctness row passed."""
        names = ("kernel", "hidden", "dtype", "precision")
        by_combination: dict[tuple, set[str]] = {}
        for row in (*self.rows["correctness"], *(row for row in self.rows["left_out"] if "errors" in row)):
            by_combination.setdefault(tuple(row[name] for name in names), set()).add(row["status"])
        capability = self.machine["capability"]
        return [
            {"capability": capability} | dict(zip(names, combination, strict=True))
            for combination, statuses in by_combination.items()
            if statuses == {"passed"}
        ]

    def wrong(self, kernel: str, hidden: int, dtype: str, precision: str) -> str | None:
        """Why a kernel must not be timed at an H and a precision: the first correctness row that failed there."""
        wanted = {"kernel": kernel, "hidden": hidden, "dtype": dtype, "precision": precision, "status": "failed"}
        with self._lock:
            for row in self.rows["correctness"]:
                if wanted.items() <= row.items():
                    return f"wrong at T={row['steps']} B={row['batch']}: {row['message']}"
        return None

    def failures(self) -> list[Row]:
        """Correctness rows and checks that failed."""
        return [row for section in ("correctness", "checks") for row in self.rows[section] if row["status"] == "failed"]

    def ratios(self) -> list[Row]:
        """Each of our measured rows, with nn.GRU's time over ours for every figure that both have."""
        rivals = {_case(row): row for row in self.rows["timings"] if row["path"] == RIVAL}
        found = []
        for row in self.rows["timings"]:
            rival = rivals.get(_case(row))
            if row["path"] == RIVAL or row["status"] != "measured" or rival is None or rival["status"] != "measured":
                continue
            ratio = {name: rival[name] / row[name] for name in FIGURES if row[name] and rival[name]}
            found.append({"row": row, "rival": rival, "ratio": ratio})
        return found

    def losses(self) -> list[Row]:
        """Cases in which nn.GRU is faster than the best of our kernels, by any of the figures."""
        best: dict[tuple, Row] = {}
        for entry in self.ratios():
            if entry["row"]["path"] not in KERNELS:
                continue
            # By GPU time where there is one: it depends least on what else the CPU does.
            rank = next(iter(entry["ratio"].values()), 0.0)
            case = _case(entry["row"])
            if case not in best or rank > next(iter(best[case]["ratio"].values()), 0.0):
                best[case] = entry
        found = []
        for entry in best.values():
            if not any(ratio < LOSS for ratio in entry["ratio"].values()):
                continue
            names = ("group", "work", "path", "steps", "batch", "hidden", "dtype", "precision")
            lost = {name: entry["row"][name] for name in names} | {"ratio": entry["ratio"]}
            lost["ours"] = {name: entry["row"][name] for name in entry["ratio"]}
            lost["nn_gru"] = {name: entry["rival"][name] for name in entry["ratio"]}
            found.append(lost)
        return found


def _case(row: Row) -> tuple:
    names = ("group", "work", "steps", "batch", "input", "hidden", "layers", "dtype", "precision")
    return tuple(row[name] for name in names)


def mode_of(row: Row) -> str:
    """fp32, tf32, bf16 or fp16."""
    return "tf32" if row["precision"] == "tf32" else SHORT_NAMES[row["dtype"]]


def floor_ms(row: Row, facts: Row, machine: Row) -> float | None:
    """What the dependent steps of a row's recurrences take at least, from the measured floors of one step.

    A forward step is its products and then its activations; a backward step has the products alone. None where it
    was not measured: another H, or more programs than processors, which would wait for one another.
    """
    if row["group"] not in ("layer", "recurrence") or row["hidden"] != FLOOR_HIDDEN or not machine["processors"]:
        return None
    if 2 * math.ceil(row["batch"] / FLOOR_ROWS) > machine["processors"]:
        return None
    floors, mode = facts["step_floor_us"], mode_of(row)
    mma, mufu = floors["mma"].get(mode), floors["mufu"].get("accurate" if mode == "fp32" else "approximate")
    if mma is None or mufu is None:
        return None
    step_us = {"forward": mma + mufu, "backward": mma, "forward+backward": 2 * mma + mufu}[row["work"]]
    return 1e-3 * step_us * row["steps"] * row["layers"]


def write_whole(path: Path, content: Any) -> None:
    """Writes JSON so that whoever opens path, whenever, finds the old content or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinities; they become null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(record: Record) -> str:
    """What the run found, for a terminal: ratios to nn.GRU, losses, proven combinations, failures."""
    lines = ["nn.GRU's time over each path's (above 1: the path is faster): GPU time, eager wall time, CUDA graph"]
    for entry in record.ratios():
        row = entry["row"]
        figures = "  ".join(f"{entry['ratio'][name]:6.2f}" if name in entry["ratio"] else "     -" for name in FIGURES)
        floor = f"  {row['gpu_ms'] / row['floor_ms']:5.1f} x floor" if row["floor_ms"] and row["gpu_ms"] else ""
        lines.append(f"{describe(row):66} {figures}{floor}")
    for row in record.rows["timings"]:
        if row["group"] == "recurrence" and row["status"] == "measured":
            floor = f"  {row['gpu_ms'] / row['floor_ms']:5.1f} x floor" if row["floor_ms"] and row["gpu_ms"] else ""
            lines.append(f"{describe(row):66} {row['gpu_ms']:.4f} ms{floor}")
    losses = record.losses()
    lines.append(f"nn.GRU wins (ratio below {LOSS}): {len(losses)} cases")
    for loss in losses:
        numbers = ", ".join(
            f"{name} {loss['ours'][name]:.4f} against {loss['nn_gru'][name]:.4f}" for name in loss["ratio"]
        )
        lines.append(f"  {describe(loss)}: {numbers}")
    machine = record.machine
    lines.append(f"proven on {machine['card']}, capability {machine['capability']} (every correctness row passed):")
    by_kernel: dict[str, list[str]] = {}
    for entry in record.proven():
        by_kernel.setdefault(f"{entry['kernel']} {mode_of(entry)}", []).append(str(entry["hidden"]))
    lines += [f"  {name}: H {', '.join(hidden)}" for name, hidden in by_kernel.items()]
    counts = {section: _counts(record.rows[section]) for section in SECTIONS}
    lines += [
        f"{section}: {', '.join(f'{n} {status}' for status, n in count.items())}" for section, count in counts.items()
    ]
    lines += [f"FAILED {describe(row)}: {row['message']}" for row in record.failures()]
    lines += [
        f"not timed: {describe(row)}: {row['message']}" for row in record.rows["timings"] if row["status"] == "failed"
    ]
    return "\n".join(lines)


def _counts(rows: list[Row]) -> dict[str, int]:
    statuses = [row["status"] for row in rows]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def describe(row: Row) -> str:
    """A row's case in a few words."""
    words = [str(row[name]) for name in ("group", "name", "work", "path", "kernel") if row.get(name)]
    if row.get("dtype"):
        words.append(mode_of(row))
    words += [
        f"{letter}={row[name]}" for letter, name in (("T", "steps"), ("B", "batch"), ("H", "hidden")) if row.get(name)
    ]
    return " ".join(words)
