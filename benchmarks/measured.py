"""Reads a folder of benchmark records, checks them, and says what each file is used for or why it is left out.

Three kinds are known, told apart by what they hold:

- `<card>-<date>.json`, from `python -m benchmarks.gpu`: correctness, checks and timings on a GPU;
- `cpu-<date>.json`, from `python -m pytest benchmarks --benchmark-json FILE`: BiGRU beside nn.GRU on a CPU;
- `resources-triton-<version>.json`, from `python -m bigru.kernels.resources --json FILE`: what the kernels compile to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.fields import Fields, RunError

SCHEMA = 1
"""The only `schema` of a GPU record that is understood."""

PEER = "nn.GRU"
"""The path that all others are compared with."""
OURS = ("triton", "resident", "cooperative")
"""The paths that are this package's kernels."""
MODES = ("fp32", "tf32", "bf16", "fp16")
"""What a precision is called: that of the products where storage is fp32, else the storage."""
STORAGES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MEASURES = {"gpu_ms": "GPU time", "eager_ms": "eager wall", "graph_ms": "graph replay"}
STATUSES = ("measured", "failed", "refused", "out of time")


@dataclass(frozen=True, order=True)
class Shape:
    """What is computed on; None where the record says that a size does not apply."""

    steps: int | None
    batch: int | None
    hidden: int | None
    input: int | None
    layers: int | None

    @property
    def is_main(self) -> bool:
        """Whether this is the main workload, as far as its sizes are recorded."""
        return all(size is None or size == getattr(MAIN, name) for name, size in vars(self).items())

    @property
    def is_main_step(self) -> bool:
        """Whether this is the recurrence of one layer of the main workload."""
        sizes = self.steps, self.batch, self.hidden
        return sizes == (MAIN.steps, MAIN.batch, MAIN.hidden) and self.layers in (None, 1)


MAIN = Shape(steps=60, batch=64, hidden=128, input=84, layers=2)
"""The main workload: the forecaster's encoder and its training batch."""


@dataclass(frozen=True)
class Work:
    """What two timings must have in common to be compared: everything but the path."""

    group: str
    work: str
    shape: Shape
    mode: str
    """One of `MODES`."""


@dataclass(frozen=True)
class Timing:
    """One path at one work; NaN is what was not measured, which is everything unless the status is "measured"."""

    work: Work
    path: str
    status: str
    message: str
    gpu_ms: float = math.nan
    eager_ms: float = math.nan
    graph_ms: float = math.nan
    peak_mib: float = math.nan
    floor_ms: float = math.nan
    error: float = math.nan
    """Norm-relative, against fp64."""
    quartiles: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why there are no figures."""
        return f"{self.status}: {self.message}" if self.message else self.status


@dataclass(frozen=True)
class Correctness:
    """One kernel at one shape against the fp64 reference."""

    kernel: str
    shape: Shape
    mode: str
    bias: bool
    errors: Mapping[str, float]
    tolerance: float
    deterministic: bool | None
    status: str
    message: str

    @property
    def worst(self) -> tuple[str, float]:
        """Name and value of the largest error, NaN counting as infinite; NaN where there is none."""
        return max(self.errors.items(), key=lambda item: size(item[1]), default=("", math.nan))


@dataclass(frozen=True)
class Check:
    """Something tried beside the sums: graph capture, memory checker, planted defect."""

    name: str
    kernel: str
    shape: Shape
    mode: str
    """One of `MODES`, or nothing for a check of all of them."""
    status: str
    message: str


@dataclass(frozen=True)
class GpuRecord:
    """One run of the benchmarks on one card."""

    file: str
    card: str
    date: datetime
    command: str
    complete: bool
    seconds: float
    machine: Mapping[str, str]
    """What the machine is made of, by name; known entries only."""
    versions: Mapping[str, str]
    facts: Mapping[str, float]
    """Name with its unit -> value, measured ones only."""
    missing_facts: Mapping[str, str]
    """Name -> why it was not measured."""
    correctness: tuple[Correctness, ...]
    checks: tuple[Check, ...]
    unchecked: Mapping[str, int]
    """What there was no time to check -> number of rows."""
    timings: Mapping[tuple[Work, str], Timing]

    def ratio(self, timing: Timing, measure: str) -> float:
        """nn.GRU's time over this one's, for the same work and precision in this record: above 1, faster than nn.GRU.

        NaN where either was not measured.
        """
        peer = self.timings.get((timing.work, PEER))
        return getattr(peer, measure) / getattr(timing, measure) if peer else math.nan

    def select(self, group: str, work: str | None = None) -> list[Timing]:
        """The timings of a group, of one work or of all."""
        return [row for row in self.timings.values() if row.work.group == group and work in (None, row.work.work)]


@dataclass(frozen=True)
class CpuRow:
    """BiGRU beside nn.GRU in the same rounds."""

    name: str
    bigru_ms: float
    nn_gru_ms: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class CpuRecord:
    """One run of the benchmarks on a CPU."""

    file: str
    date: datetime
    cpu: str
    cores: int
    threads: int
    versions: Mapping[str, str]
    rows: tuple[CpuRow, ...]


@dataclass(frozen=True)
class Compiled:
    """What one kernel compiles to in one configuration; None where it does not compile."""

    arch: str
    kernel: str
    hidden: int
    mode: str
    rows: int | None
    warps: int | None
    registers: int | None
    spilled: int | None
    shared: int | None
    limit: int
    instructions: int | None
    barriers: int | None
    problem: str


@dataclass(frozen=True)
class ResourcesRecord:
    """What every shipped kernel compiles to under one triton."""

    file: str
    date: datetime
    triton: str
    ptxas: str
    kernels: tuple[Compiled, ...]


Record = GpuRecord | CpuRecord | ResourcesRecord


class LeftOut(Exception):
    """A sound file that the document does not use, for the reason given."""


@dataclass(frozen=True)
class Results:
    """A folder of records: the newest first in each list, and what is left out, by file, with the reason."""

    gpu: tuple[GpuRecord, ...] = ()
    cpu: tuple[CpuRecord, ...] = ()
    resources: tuple[ResourcesRecord, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    def cards(self) -> list[list[GpuRecord]]:
        """The records of each card, the one to show first: the newest complete one, or else the newest."""
        by_card: dict[str, list[GpuRecord]] = {}
        for record in self.gpu:
            by_card.setdefault(record.card, []).append(record)
        # Sorting is stable: among complete ones the newest stays first.
        return [sorted(by_card[card], key=lambda record: not record.complete) for card in sorted(by_card)]


def read_results(folder: Path) -> Results:
    """Reads every JSON file of a folder.

    Raises:
        RunError: it is not a folder, or it holds broken files and no sound one.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder")
    records: list[Record] = []
    left_out, broken = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(_read(path))
        except LeftOut as reason:
            left_out[path.name] = str(reason)
        except RunError as error:
            broken[path.name] = str(error)
    if broken and not records:
        raise RunError("; ".join(f"{folder / name}: {error}" for name, error in broken.items()))
    # Versions count when dates are the same: 3.10 is newer than 3.9.
    records.sort(key=lambda r: (r.date, _version(r.triton) if isinstance(r, ResourcesRecord) else []), reverse=True)
    return Results(
        gpu=tuple(record for record in records if isinstance(record, GpuRecord)),
        cpu=tuple(record for record in records if isinstance(record, CpuRecord)),
        resources=tuple(record for record in records if isinstance(record, ResourcesRecord)),
        left_out=left_out,
        broken=broken,
    )


def _version(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def size(error: float) -> float:
    """An error to sort by: NaN is the largest."""
    return math.inf if math.isnan(error) else error


def _read(path: Path) -> Record:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"expected a JSON object, got {type(values).__name__}")
    fields = Fields("record", values)
    if "schema" in values:
        return _read_gpu(path.name, fields)
    if "machine_info" in values:
        return _read_cpu(path.name, fields)
    if "ptxas" in values:
        return _read_resources(path.name, fields)
    raise RunError("no record that is known: it has neither schema (GPU), machine_info (CPU) nor ptxas (resources)")


def _read_date(fields: Fields, name: str) -> datetime:
    text = fields.text(name)
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise RunError(f"{fields.where}: {name} should be a date as in ISO 8601, got {text!r}") from error
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _read_choice(fields: Fields, name: str, known: Sequence[str]) -> str:
    if (value := fields.text(name)) not in known:
        raise RunError(f"{fields.where}: {name} should be {' or '.join(map(repr, known))}, got {value!r}")
    return value


def _text(fields: Fields, name: str) -> str:
    """A string that may be null or absent."""
    return fields.text(name) if fields.values.get(name) is not None else ""


def _count(fields: Fields, name: str) -> int | None:
    """A whole number that may be null or absent."""
    return fields.count(name) if fields.values.get(name) is not None else None


def _positive(fields: Fields, name: str) -> float:
    """A number more than 0; null is NaN."""
    value = fields.number(name)
    if not (math.isnan(value) or 0 < value < math.inf):
        raise RunError(f"{fields.where}: {name} should be more than 0 and finite, got {value!r}")
    return value


def _read_shape(fields: Fields) -> Shape:
    return Shape(**{name: _count(fields, name) for name in ("steps", "batch", "hidden", "input", "layers")})


def _read_mode(fields: Fields, storage: str) -> str:
    name = fields.text(storage)
    mode = STORAGES.get(name, name)
    if mode == "fp32":
        return _read_choice(fields, "precision", ("fp32", "tf32"))
    if mode not in MODES:
        raise RunError(f"{fields.where}: {storage} should be fp32, bf16 or fp16, got {name!r}")
    return mode


def _read_gpu(file: str, fields: Fields) -> GpuRecord:
    if (schema := fields.count("schema")) != SCHEMA:
        raise RunError(f"schema {schema} is not known; this version of the report reads {SCHEMA}")
    if _read_choice(fields, "kind", ("gpu", "cpu-smoke")) == "cpu-smoke":
        raise LeftOut("a trial of the GPU benchmarks on a CPU, which measures nothing")
    versions, machine = fields.inside("versions"), fields.inside("machine")
    timings: dict[tuple[Work, str], Timing] = {}
    for entry in fields.objects("timings"):
        timing = _read_timing(entry)
        if (timing.work, timing.path) in timings:
            raise RunError(f"{entry.where}: a second row of {timing.path} for the same work: {timing.work}")
        timings[timing.work, timing.path] = timing
    return GpuRecord(
        file=file,
        card=machine.text("card"),
        date=_read_date(fields, "date"),
        command=fields.text("command"),
        complete=fields.flag("complete"),
        seconds=fields.number("seconds"),
        machine=_read_machine(machine),
        versions={name: _as_text(value) or "none" for name, value in versions.values.items()},
        facts=_read_facts(fields),
        missing_facts={name: str(why) for name, why in (fields.values.get("missing_facts") or {}).items()},
        correctness=tuple(_read_correctness(entry) for entry in fields.objects("correctness")),
        checks=tuple(_read_check(entry) for entry in fields.objects("checks")),
        unchecked=_read_unchecked(fields),
        timings=timings,
    )


def _read_machine(fields: Fields) -> dict[str, str]:
    """The parts by the names of the document, as text; those that are null left out."""
    named = {
        "Compute capability": ".".join(map(str, fields.values.get("capability") or ())),
        "Processors": _as_text(fields.values.get("processors")),
        "Memory": _as_text(fields.values.get("memory_gib"), " GiB"),
        "Driver": _as_text(fields.values.get("driver")),
        "CPU": _as_text(fields.values.get("cpu")),
        "CPU cores": _as_text(fields.values.get("cpu_cores")),
    }
    return {name: text for name, text in named.items() if text}


def _as_text(value: object, unit: str = "") -> str:
    return "" if value is None else f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}"


def _read_facts(fields: Fields) -> dict[str, float]:
    """The facts by name; those inside others as `outer inner`, those that are null left out."""
    found: dict[str, float] = {}

    def collect(inner: Fields, before: str) -> None:
        for name, value in inner.values.items():
            if isinstance(value, dict):
                collect(inner.inside(name), f"{before}{name} ")
            elif value is not None:
                found[f"{before}{name}"] = inner.number(name)

    if fields.values.get("facts") is not None:
        collect(fields.inside("facts"), "")
    return found


def _read_timing(fields: Fields) -> Timing:
    status = _read_choice(fields, "status", STATUSES)
    work = Work(fields.text("group"), fields.text("work"), _read_shape(fields), _read_mode(fields, "dtype"))
    timing = Timing(work, fields.text("path"), status, _text(fields, "message"))
    # Whatever else the row of a failure may hold is no figure.
    if status != "measured":
        return timing
    numbers = {name: _positive(fields, name) for name in (*MEASURES, "peak_mib", "floor_ms")}
    quartiles = {}
    for name, pair in (fields.values.get("quartiles") or {}).items():
        if pair is not None:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(q, int | float) for q in pair)):
                raise RunError(f"{fields.where}: quartiles: {name} should be two numbers, got {pair!r}")
            quartiles[name] = (float(pair[0]), float(pair[1]))
    return Timing(
        work, timing.path, status, timing.message, **numbers, error=fields.number("error"), quartiles=quartiles
    )


def _read_correctness(fields: Fields) -> Correctness:
    status = _read_choice(fields, "status", ("passed", "failed", "refused"))
    errors = fields.inside("errors") if fields.values.get("errors") is not None else Fields(fields.where, {})
    bias, deterministic = fields.flag("bias"), fields.values.get("deterministic")
    return Correctness(
        kernel=fields.text("kernel"),
        shape=_read_shape(fields),
        mode=_read_mode(fields, "dtype"),
        bias=bias,
        # JSON has no NaN: null is an error that is no number, but for the gradient of a bias that is not there.
        errors={name: errors.number(name) for name in errors.values if bias or name != "db_hn"},
        tolerance=fields.number("tolerance") if "tolerance" in fields.values else math.nan,
        deterministic=fields.flag("deterministic") if deterministic is not None else None,
        status=status,
        message=_text(fields, "message"),
    )


def _read_check(fields: Fields) -> Check:
    return Check(
        name=fields.text("name"),
        kernel=_text(fields, "kernel"),
        shape=_read_shape(fields),
        mode=_read_mode(fields, "dtype") if "dtype" in fields.values else "",
        status=_read_choice(fields, "status", ("passed", "failed", "not available")),
        message=_text(fields, "message"),
    )


def _read_unchecked(fields: Fields) -> dict[str, int]:
    """Counts the rows of checks for which there was no time; a correctness row is one with errors, and has no name."""
    counts: dict[str, int] = {}
    for entry in fields.objects("left_out") if "left_out" in fields.values else ():
        what = f"{_text(entry, 'name') or 'correctness'} of {entry.text('kernel')}"
        counts[what] = counts.get(what, 0) + 1
    return counts


def _read_cpu(file: str, fields: Fields) -> CpuRecord:
    machine = fields.inside("machine_info")
    place, cpu = machine.inside("bigru"), machine.inside("cpu")
    if card := _text(place, "card"):
        raise LeftOut(f"pytest-benchmark's figures on {card}; GPU figures come from `python -m benchmarks.gpu`")
    rows = []
    for entry in fields.objects("benchmarks"):
        extra = entry.inside("extra_info")
        if "nn_gru_ms" not in extra.values:  # nothing stands beside it: the loader, the loop
            continue
        times = {name: _positive(extra, name) for name in ("bigru_ms", "nn_gru_ms", "ratio", "low", "high")}
        rows.append(CpuRow(extra.text("name"), **times))
    return CpuRecord(
        file=file,
        date=_read_date(fields, "datetime"),
        cpu=_text(cpu, "brand_raw") or machine.text("machine"),
        cores=cpu.count("count"),
        threads=place.count("threads"),
        versions={name: place.text_or_none(name) for name in ("python", "torch", "numpy")},
        rows=tuple(rows),
    )


def _read_resources(file: str, fields: Fields) -> ResourcesRecord:
    return ResourcesRecord(
        file=file,
        date=_read_date(fields, "date"),
        triton=fields.text("triton"),
        ptxas=fields.text("ptxas"),
        kernels=tuple(_read_compiled(entry) for entry in fields.objects("rows")),
    )


def _read_compiled(fields: Fields) -> Compiled:
    config = fields.inside("config") if "config" in fields.values else Fields(fields.where, {})
    failed = fields.values.get("error") is not None
    sizes = {
        name: None if failed else fields.count(name)
        for name in ("registers", "spilled", "shared", "instructions", "barriers")
    }
    return Compiled(
        arch=fields.text("arch"),
        kernel=fields.text("kernel")
        + (", packed" if fields.values.get("packed") is True else "")
        + (", inference" if fields.values.get("save") is False else ""),
        hidden=fields.count("hidden"),
        mode=_read_mode(fields, "storage"),
        rows=_count(config, "block_batch") or _count(config, "rows"),
        warps=_count(fields, "num_warps") or _count(config, "num_warps"),
        limit=fields.count("limit"),
        problem=_text(fields, "problem"),
        **sizes,
    )
