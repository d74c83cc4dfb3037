"""The schema of a benchmark's record: what writes one and what reads one both use this module.

A record is a JSON file `<machine>-<date>-<time>.json` in benchmarks/results. Each of its rows is one candidate (one of
BiGRU's backends) beside one rival, timed in the same rounds on the same weights and inputs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = 2
GROUPS = ("layer", "ragged", "call", "training step", "busy core")
"""Layers of BiGRU; the same, ragged; many calls of almost no arithmetic; a step of the forecaster's training; layers
beside a process that keeps one core busy."""
MODES = ("forward", "training")
"""Forward without gradients; forward and backward (of a training step, its optimizer too)."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "default")
"""fp32 and tf32 are the products of fp32 storage; bf16 and fp16 are the storage; default is what either side does
unasked, which on a GPU allows nn.GRU TF32."""
CLOCKS = {"wall": "wall time", "gpu": "GPU time", "graph": "graph replay"}
"""What the caller waits; between two CUDA events; the same work replayed as a CUDA graph."""
STATUSES = ("measured", "failed", "refused", "late")
"""Failed: a wrong result or a crash. Refused: the candidate does not take the case. Late: there was no time for it."""
NN_GRU = "nn.GRU"
GEMM = "torch.mm"
"""As many multiplications in one product of matrices: no rival, but the machine's own rate."""


class RecordError(ValueError):
    """A file that is no record, or not one of a known schema."""


@dataclass(frozen=True)
class Row:
    """One candidate beside one rival at one case; figures are None unless the status is "measured"."""

    group: str
    mode: str
    candidate: str
    """BiGRU's backend, by the name that `BiGRU(backend=...)` takes."""
    rival: str
    """"nn.GRU", "onnxruntime", ..., or "torch.mm", the machine's own rate."""
    batch: int
    steps: int
    hidden: int
    input: int = 84
    layers: int = 2
    precision: str = "fp32"
    clock: str = "wall"
    threads: int | None = None
    """Of the CPU; None for work of a GPU."""
    # Any number, since a row that was not measured has None for all of them.
    ours_ms: Any = None
    """Median over the rounds, as all figures here; milliseconds."""
    rival_ms: Any = None
    ratio: Any = None
    """The rival's time over ours, round by round: above 1 ours is faster."""
    low: Any = None
    """First quartile of the ratio."""
    high: Any = None
    """Third quartile of the ratio."""
    rounds: int = 0
    error: float | None = None
    """Largest norm-relative error of outputs and gradients at this very case, against fp64."""
    status: str = "measured"
    message: str = ""

    def __post_init__(self) -> None:
        known = (("group", GROUPS), ("mode", MODES), ("precision", PRECISIONS), ("clock", CLOCKS), ("status", STATUSES))
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise RecordError(f"{name} should be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("batch", "steps", "hidden", "layers", "input"):
            if not isinstance(getattr(self, name), int):
                raise RecordError(f"{name} should be a whole number, got {getattr(self, name)!r}")
        if self.status == "measured":
            for name in ("ours_ms", "rival_ms", "ratio", "low", "high"):
                value = getattr(self, name)
                if not (isinstance(value, int | float) and 0 < value < math.inf):
                    raise RecordError(f"{name} of a measured row should be more than 0, got {value!r}")


@dataclass(frozen=True)
class Check:
    """Something tried beside the timings: a kernel against fp64, a planted defect, a memory checker."""

    name: str
    candidate: str
    status: str
    """"passed", "failed" or "not available"."""
    message: str = ""


@dataclass
class Record:
    """What one run of the benchmarks found on one machine.

    Args:
        kind: "cpu", "gpu", "proof", or "smoke" for a trial whose figures mean nothing.
        command: prints or writes the same again.
        machine: `name` ("NVIDIA H100", "AMD EPYC"), and what else is known, such as `cores`.
        versions: of bigru, python, torch, triton, numpy and the rivals; None for one that is not there.
        date: ISO 8601, in UTC.
        complete: whether nothing was left out for lack of time.
        profile: GPU kernels of the main workload, by candidate: (name, calls, milliseconds), longest first.
    """

    kind: str
    command: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0
    complete: bool = True
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    profile: dict[str, list[tuple[str, int, float]]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name: a second record of the same day does not replace the first."""
        machine = "smoke" if self.kind == "smoke" else re.sub(r"[^A-Za-z0-9]+", "-", str(self.machine["name"]))
        return f"{machine.strip('-')}-{datetime.fromisoformat(self.date):%Y-%m-%d-%H%M%S}.json"

    def write(self, path: Path) -> Path:
        """Writes the record whole or not at all: to a file, or into a folder under its own name; returns its path."""
        path = path / self.name if path.is_dir() else path
        text = json.dumps({"schema": SCHEMA} | _finite(asdict(self)), indent=1, allow_nan=False)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def read_record(path: Path) -> Record:
    """Reads one record.

    Raises:
        RecordError: the file is no record; the message says in what place.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
            raise RecordError(f"no record of schema {SCHEMA}")
        values["rows"] = [Row(**row) for row in values["rows"]]
        values["checks"] = [Check(**check) for check in values["checks"]]
        record = Record(**values)
        datetime.fromisoformat(record.date)
        str(record.machine["name"])
        return record
    except RecordError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{type(error).__name__}: {error}") from error


def read_records(folder: Path) -> tuple[list[Record], dict[str, str]]:
    """The records of a folder by date, smoke trials left out; and the files that are none, with the reason."""
    records, broken = [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except RecordError as error:
            broken[path.name] = str(error)
    return sorted((record for record in records if record.kind != "smoke"), key=lambda record: record.date), broken


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinities; they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
