"""What "auto" knows of the kernels: a record that `python -m bigru.prove` left on this machine, or a committed one."""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bigru.kernels.config import Call, Device
from bigru.kernels.record import NN_GRU, Record, RecordError, Row, read_record

log = logging.getLogger("bigru")

COMMITTED = Path(__file__).with_name("proven")
"""Folder of the records that come with the package; none is there yet, since no run on a GPU has been recorded."""
COMMAND = "python -m bigru.prove"
CLOCKS = ("wall", "gpu")
"""By all of which a kernel must not be slower."""
Size = tuple[int, int, int]
"""H, B and T."""


@dataclass(frozen=True, eq=False)
class Proofs:
    """The kernels that a record proves, for every size of it.

    Args:
        source: what is told of where they come from.
        ranked: by group, precision and threads, then by size: the kernels that were right and in no mode slower than
            ATen's GRU, the fastest in training first, each with its least ratio.
        wrong: kernels that failed a check.
    """

    source: str
    ranked: Mapping[tuple[str, str, int | None], Mapping[Size, tuple[tuple[str, float], ...]]]
    wrong: frozenset[str] = frozenset()

    def of(self, call: Call) -> tuple[tuple[str, ...], str] | None:
        """Returns what is known of a call: the kernels that "auto" may take, the best first, and why.

        The nearest H and B at or above the call's stand for it, and of these the nearest T at or below. Under a
        compiler, whose graph serves every B and T, a kernel must be proven at all of the H. None: there is no such
        size.
        """
        return known(self, call, torch.get_num_threads() if call.device.type == "cpu" else None)


@functools.lru_cache
def known(proofs: Proofs, call: Call, threads: int | None) -> tuple[tuple[str, ...], str] | None:
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: call.precision}.get(call.dtype, "")
    sizes = proofs.ranked.get(("ragged" if call.varlen else "layer", precision, threads), {})
    fitting = [size for size in sizes if size[0] >= call.hidden]
    if call.batch is None or call.steps is None:
        stands = [size for size in fitting if size[0] == min(fitting)[0]]
    else:
        # The more steps, the less a call's beginning counts: what is fast for a few is for many.
        fitting = [(h, b, -t) for h, b, t in fitting if b >= call.batch and t <= call.steps]
        stands = [(h, b, -t) for h, b, t in fitting if (h, b, t) == min(fitting)]
    if not stands:
        return None
    ranked = {size: dict(sizes[size]) for size in stands}
    names = [name for name in ranked[stands[0]] if all(name in found for found in ranked.values())]
    figures = [f"{name} {ranked[stands[0]][name]:.1f}" for name in names] or ["no kernel as fast"]
    where = "H={} B={} T={}".format(*stands[0])
    return tuple(names), f"times as fast as ATen's GRU at {where}: {', '.join(figures)} ({proofs.source})"


def proofs_of(record: Record, source: str) -> Proofs:
    """Returns what a record proves."""
    wrong = frozenset(check.candidate for check in record.checks if check.status == "failed")
    rows_of: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in record.rows:
        if row.rival == NN_GRU and row.status in ("measured", "failed") and row.clock in CLOCKS:
            key = row.group, row.precision, row.threads
            rows_of[key, (row.hidden, row.batch, row.steps), row.candidate].append(row)
    found: defaultdict[Any, defaultdict[Size, list[tuple[float, str, float]]]] = defaultdict(lambda: defaultdict(list))
    for (key, size, name), rows in rows_of.items():
        ratio = min(row.ratio or 0.0 for row in rows)
        right = name not in wrong and {row.mode for row in rows} == {"forward", "training"}
        slowest = max(row.ours_ms or 0.0 for row in rows if row.mode == "training") if right else 0.0
        found[key][size] += [(slowest, name, ratio)] if right and ratio >= 1 else []
    best = {
        key: {size: tuple((name, ratio) for _, name, ratio in sorted(ranking)) for size, ranking in sizes.items()}
        for key, sizes in found.items()
    }
    return Proofs(source, best, wrong)


@functools.cache
def proofs(device: Device) -> Proofs | None:
    """Returns what is proven on a device, or None; a file that is of no use is named once, and then left alone."""
    path = proof_path(device)
    if os.path.isfile(path):  # noqa: PTH113, which is False too for a folder that nobody may read
        try:
            record = read_record(path)
            if not (other := stale(record, *keys(device))):
                return proofs_of(record, str(path))
            log.warning("%s is ignored, made with %s; %s makes it anew", path, other, COMMAND)
        except RecordError as error:
            log.warning("%s is ignored: %s; %s makes it anew", path, error, COMMAND)
    for path in sorted(COMMITTED.glob("*.json")):
        record = read_record(path)
        if device.type == "cuda" and tuple(record.machine.get("capability", ())) == device.capability:
            return proofs_of(record, path.name)
    return None


@functools.cache
def hint(device: Device) -> None:
    """Says once where nothing is proven, in the first of several processes, what would mend that."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(
            'no kernel is proven here, so that "auto" takes ATen\'s GRU: `%s` would write %s',
            COMMAND,
            proof_path(device),
        )


def stale(record: Record, machine: Mapping[str, Any], versions: Mapping[str, str | None]) -> str:
    """Returns in what a record was made elsewhere than on the machine and the versions given; empty if in nothing."""
    pairs = [("name", record.machine, machine), ("driver", record.machine, machine)]
    pairs += [(name, record.versions, versions) for name in ("bigru", "torch", "triton")]
    return "; ".join(
        f"{n} {there.get(n)}, not {here.get(n)}" for n, there, here in pairs if there.get(n) != here.get(n)
    )


def proof_path(device: Device) -> Path:
    """Returns where a device's record is kept, in the user's cache folder."""
    # Not Path.home(), which fails for an unknown user.
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bigru"  # noqa: PTH111
    return folder / f"proof-{re.sub(r'[^A-Za-z0-9]+', '-', keys(device)[0]['name'])}.json"


def keys(device: Device) -> tuple[dict[str, str], dict[str, str | None]]:
    """Returns what a record of a device must say of the machine and of the versions to be of use."""
    from bigru import __version__

    triton = None
    with suppress(PackageNotFoundError):
        triton = version("triton")
    versions = {"bigru": __version__, "torch": str(torch.__version__), "triton": triton}
    if device.type == "cuda":
        return {"name": torch.cuda.get_device_name(), "driver": driver()}, versions
    return {"name": processor()}, versions


@functools.cache
def processor(information: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the name of the CPU."""
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver(information: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Returns the version of the GPU's driver, which it says itself, without a process that asks it."""
    text = information.read_text(encoding="utf-8") if information.is_file() else ""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else "unknown"
