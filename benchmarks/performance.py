"""The performance document: what the records of a folder measured, and "not measured yet" where none did."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from benchmarks.markdown import significant, under
from benchmarks.measured import (
    MAIN,
    MODES,
    PEER,
    Compiled,
    CpuRecord,
    GpuRecord,
    Record,
    ResourcesRecord,
    Results,
    read_results,
)
from benchmarks.performance_card import IMAGES, SECTIONS, Plots, card_sections
from bigru.files import ESCAPE, write_atomically
from bigru.report import figures
from bigru.report.markdown import blocks, code, plain, table

NOT_MEASURED = "Not measured yet."
HOW_TO_MEASURE = "On a machine with a GPU, `python -m benchmarks.gpu --out benchmarks/results` writes the record."


def write_performance(results: Path, out: Path) -> tuple[list[Path], Results]:
    """Writes the document and its plots from a folder of records.

    Arguments:
        results: the folder of records; only its `*.json` files are read.
        out: the document; the plots go to `docs/images/performance` in its folder.

    Returns:
        the paths written, the document first, and what was read.

    Raises:
        RunError: the folder is none, or it holds broken records and no sound one; nothing is written then.
    """
    read = read_results(results)
    # Never as the caller spelt it: the document must not depend on the folder it was made from.
    folder = Path(os.path.relpath(results.resolve(), out.parent.resolve())).as_posix()
    drawn: Plots = {}
    text = document(read, folder, out.name, drawn)
    pictures = {out.parent / IMAGES / f"{name}.png": figure for name, figure in drawn.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, figure in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, figures.png(figure))
    write_atomically(out, text.encode(errors=ESCAPE))
    return [out, *pictures], read


def document(results: Results, folder: str, name: str, drawn: Plots) -> str:
    """The whole text; the plots it shows are put into `drawn` by name.

    Arguments:
        results: what was read.
        folder: of the records, as seen from the document.
        name: of the document.
        drawn: filled with the plots.
    """
    cards = results.cards()
    gpu = [card_sections(records, drawn) for records in cards] if cards else [unmeasured_sections(results)]
    return (
        blocks(
            "# Performance",
            f"Written by {code(_report_command(folder, name))} from the records in [{folder}]({folder}); "
            "change those, not this file.",
            _reading(),
            *gpu,
            "## What the kernels compile to",
            _compiled(results.resources, folder),
            "## On a CPU",
            _on_a_cpu(results.cpu, folder),
            "## Records",
            _records(results, cards, folder),
        )
        + "\n"
    )


def _report_command(folder: str, name: str) -> str:
    options = [f"--results {folder}"] if folder != "benchmarks/results" else []
    options += [f"--out {name}"] if name != "PERFORMANCE.md" else []
    return " ".join(["python -m bigru.report performance", *options])


def _reading() -> str:
    return "\n".join(
        (
            "- **Times** are medians. GPU time is that between two CUDA events, without what the CPU takes to launch; "
            "eager wall is what a caller waits; graph replay is the same work captured into a CUDA graph.",
            f"- **Ratio** is {PEER}'s time over this path's in the same record, for the same shape and the same "
            f"precision: above 1 is faster than {PEER}.",
            "- **Precision**: `fp32` and `tf32` are the products of the recurrence, storage being fp32; `bf16` and "
            "`fp16` are the storage.",
            "- **Error** is norm-relative, against fp64, found before the path was timed.",
            "- **Main workload**: T=60 time steps, B=64 sequences, I=84 inputs, H=128 hidden units, 2 layers, both "
            "directions.",
            "- A row without a figure says why; no figure here is an estimate.",
        )
    )


def unmeasured_sections(results: Results) -> str:
    """The same sections where there is no record to take them from."""
    why = " There are records, but none can be used: see [Records](#records)." if _unusable(results) else ""
    parts = ["## On a GPU", f"{NOT_MEASURED}{why} {HOW_TO_MEASURE}"]
    for heading in (*SECTIONS, "Over time"):
        parts += [f"### {heading}", NOT_MEASURED]
    return blocks(*parts)


def _unusable(results: Results) -> bool:
    """Whether a broken file may be the record of a GPU: its name is not that of another kind."""
    return any(not name.startswith(("cpu-", "resources-")) for name in results.broken)


def _compiled(records: Sequence[ResourcesRecord], folder: str) -> str:
    if not records:
        return f"{NOT_MEASURED} `python -m bigru.kernels.resources --json FILE` writes the record; it needs no GPU."
    record = records[0]
    small_print = under(
        f"no machine, compiled only, {record.date:%Y-%m-%d}; triton {record.triton}, ptxas {record.ptxas}; "
        "precision as in the table",
        f"python -m bigru.kernels.resources --json {folder}/{record.file}",
    )
    archs = list(dict.fromkeys(row.arch for row in record.kernels))
    main = [row for row in record.kernels if row.hidden == MAIN.hidden]
    others = [row for row in record.kernels if row.hidden != MAIN.hidden and row.mode == "fp32"]
    # One architecture is enough to see the rest, the one with most to say about the main workload.
    arch = "sm_90" if "sm_90" in archs else archs[-1] if archs else ""
    return blocks(
        "Sizes, not times: no GPU is needed for these, and none was used. N: batch rows of one program; registers: of "
        "one thread; spilled: its stack; shared: of one program; instructions and barriers: of the largest loop in the "
        "machine code, one time step. Forward kernels save the gates, as in training, unless they say inference.",
        "**By architecture**",
        table(
            ["architecture", "kernels", "most registers", "spilling", "not to be shipped"],
            [_of_arch(arch, [row for row in record.kernels if row.arch == arch]) for arch in archs],
            left=1,
        ),
        small_print,
        f"**H={MAIN.hidden}, {arch}**",
        _sizes([row for row in main if row.arch == arch]),
        small_print,
        f"**Other sizes at fp32, {arch}**",
        _sizes([row for row in others if row.arch == arch]),
        small_print,
    )


def _of_arch(arch: str, rows: Sequence[Compiled]) -> list[str]:
    registers = [row.registers for row in rows if row.registers is not None]
    counts = (
        len(rows),
        max(registers, default=0),
        sum(bool(row.spilled) for row in rows),
        sum(bool(row.problem) for row in rows),
    )
    return [plain(arch), *map(str, counts)]


def _sizes(rows: Sequence[Compiled]) -> str:
    if not rows:
        return "None compiled."
    headers = [
        "kernel",
        "precision",
        "H",
        "N",
        "warps",
        "registers",
        "spilled, B",
        "shared, B",
        "limit, B",
        "instructions a step",
        "barriers a step",
        "problem",
    ]
    ordered = sorted(rows, key=lambda row: (row.hidden, MODES.index(row.mode), row.rows or 0))
    return table(headers, [_size_cells(row) for row in ordered], left=2)


def _size_cells(row: Compiled) -> list[str]:
    sizes = (
        row.hidden,
        row.rows,
        row.warps,
        row.registers,
        row.spilled,
        row.shared,
        row.limit,
        row.instructions,
        row.barriers,
    )
    numbers = ["-" if size is None else f"{size:,}" for size in sizes]
    return [plain(row.kernel), row.mode, *numbers, plain(row.problem) or "none"]


def _on_a_cpu(records: Sequence[CpuRecord], folder: str) -> str:
    if not records:
        return f"{NOT_MEASURED} `python -m pytest benchmarks --benchmark-json FILE` writes the record."
    record = records[0]
    cells = [
        [
            plain(row.name),
            significant(row.bigru_ms),
            significant(row.nn_gru_ms),
            f"{significant(row.ratio)}x",
            f"{significant(row.low)} to {significant(row.high)}",
        ]
        for row in record.rows
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return blocks(
        f"On a CPU `BiGRU` is ATen's own GRU: these rows show what the module adds on top of {PEER}, and nothing about "
        "the kernels. Wall times, I=84, 2 layers, T=60 where nothing else is said; the ratio is the "
        "median of the ratios of each round.",
        table(["work", "BiGRU, ms", f"{PEER}, ms", "ratio", "quartiles of the ratio"], cells, left=1),
        under(
            f"{record.cpu}, {record.threads} of {record.cores} cores used, {record.date:%Y-%m-%d}; {versions}; "
            "precision as in the table",
            f"OMP_NUM_THREADS={record.threads} python -m pytest benchmarks --benchmark-json {folder}/{record.file}",
        ),
    )


def _records(results: Results, cards: Sequence[Sequence[GpuRecord]], folder: str) -> str:
    if not any((results.gpu, results.cpu, results.resources, results.left_out)):
        return "None."
    every: list[Record] = [*results.gpu, *results.cpu, *results.resources]
    newest: list[Record] = [*(records[0] for records in cards), *results.cpu[:1], *results.resources[:1]]
    shown = {record.file for record in newest}
    rows = []
    for record in every:
        what, otherwise = _kind(record)
        use = "shown" if record.file in shown else otherwise
        rows.append([_link(record.file, folder), plain(what), f"{record.date:%Y-%m-%d %H:%M}", use])
    rows += _reasons(results.left_out, "left out", folder) + _reasons(results.broken, "**broken**, left out", folder)
    return table(["file", "what", "date (UTC)", "use"], rows, left=4)


def _kind(record: Record) -> tuple[str, str]:
    """What a record is, and its use where it is not the one shown."""
    if isinstance(record, GpuRecord):
        return f"GPU, {record.card}{'' if record.complete else ', incomplete'}", "over time only"
    if isinstance(record, CpuRecord):
        return f"CPU, {record.cpu}", "left out: older"
    return f"compiled sizes, triton {record.triton}", "left out: older"


def _reasons(reasons: Mapping[str, str], use: str, folder: str) -> list[list[str]]:
    return [[_link(name, folder), "-", "-", f"{use}: {plain(reason)}"] for name, reason in reasons.items()]


def _link(name: str, folder: str) -> str:
    return f"[{plain(name)}]({quote(f'{folder}/{name}')})"
