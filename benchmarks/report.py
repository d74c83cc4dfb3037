"""Writes PERFORMANCE.md and its plots from the records of the benchmarks: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import plots
from bigru.files import write_atomically
from bigru.kernels.record import CLOCKS, GEMM, Record, RecordError, Row, read_records
from bigru.report import figures
from bigru.report.markdown import blocks, code, plain, table

IMAGES = Path("docs/images/performance")
"""Of the plots, as seen from the document."""
MOST_ROWS = 8
"""In the first table."""
LEGEND = (
    "`call`: 50 calls of one step, which `auto` leaves to ATen's GRU (`torch`); `busy core`: beside a process that "
    "only computes; `torch.mm`: no rival but the machine's own rate, one product that multiplies as often."
)
LOSS = 0.95
"""A ratio below this one is a loss: nearer to 1 it may be the measurement's noise."""
NO_GPU = (
    "**No GPU has been measured yet:** nothing is known of the Triton kernels' speed "
    "(`python -m benchmarks.gpu --out benchmarks/results` on a machine with a GPU writes the record)."
)


def write_performance(results: Path, out: Path) -> tuple[list[Path], dict[str, str]]:
    """Writes the document and its plots from a folder of records.

    Args:
        results: the folder; its `*.json` files are read.
        out: the document; the plots go to `docs/images/performance` in its folder.

    Returns:
        The paths written, the document first; and the files that are no records, with the reason.

    Raises:
        RecordError: the folder is none, or it holds broken records and no sound one; nothing is written then.
    """
    if not results.is_dir():
        raise RecordError(f"{results} is not a folder")
    records, broken = read_records(results)
    if broken and not records:
        raise RecordError("; ".join(f"{results / name}: {why}" for name, why in broken.items()))
    folder = Path(os.path.relpath(results.resolve(), out.parent.resolve())).as_posix()
    pictures: dict[Path, Figure] = {}
    for machine, own in by_machine(records).items():
        drawn = {"speed-up": plots.speed_up(own[-1]), "over-time": plots.over_time(own)}
        pictures |= {picture(machine, name): figure for name, figure in drawn.items() if figure is not None}
    (out.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for path, figure in pictures.items():
        write_atomically(out.parent / path, figures.png(figure))
    write_atomically(out, document(records, broken, folder, set(pictures)).encode())
    return [out, *(out.parent / path for path in pictures)], broken


def by_machine(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns each machine's records, the one that is shown last: the newest that is complete or fills the first table.

    Machines with a GPU come first, then those with the newest record.
    """
    machines: dict[str, list[Record]] = {}
    for record in records:
        machines.setdefault(str(record.machine["name"]), []).append(record)
    for own in machines.values():
        own.sort(key=lambda record: (record.complete or len(headline(record)) >= MOST_ROWS, record.date))
    newest = sorted(machines.items(), key=lambda item: item[1][-1].date, reverse=True)
    return dict(sorted(newest, key=lambda item: item[1][-1].kind != "gpu"))


def picture(machine: str, name: str) -> Path:
    """Returns a plot's path as seen from the document."""
    slug = "-".join("".join(letter if letter.isalnum() else " " for letter in machine.lower()).split())
    return IMAGES / f"{slug}-{name}.png"


def document(records: Sequence[Record], broken: Mapping[str, str], folder: str, drawn: set[Path]) -> str:
    """Returns the whole text.

    Args:
        records: sound ones, by date.
        broken: files that are none, and why.
        folder: of the records, as seen from the document.
        drawn: the pictures that there are.
    """
    parts = ["# Performance"]
    if not any(record.kind == "gpu" for record in records):
        parts.append(NO_GPU)
    machines = by_machine(records)
    for number, (machine, own) in enumerate(machines.items()):
        parts += [f"## On {plain(machine)}"] * (number > 0) + _machine(machine, own, folder, drawn)
    if records or broken:
        parts += ["## Records", _records(records, broken, folder)]
    else:
        parts.append("Nothing has been measured yet.")
    command = "python -m benchmarks.report"
    parts.append(f"<sub>Written by {code(command)} from [{folder}]({folder}); change the records, not this file.</sub>")
    return blocks(*parts) + "\n"


def _machine(machine: str, records: Sequence[Record], folder: str, drawn: set[Path]) -> list[str]:
    """Returns everything about one machine: the answer first, then whatever else its record holds."""
    record = records[-1]
    main = headline(record)
    parts = []
    if main:
        parts += [answer(machine, record, main), _headline_table(main)]
    if (path := picture(machine, "speed-up")) in drawn:
        parts.append(f"![Speed-up over nn.GRU against the batch size]({path.as_posix()})")
    parts.append(_under(record))
    measured = [row for row in record.rows if row.status == "measured"]
    others = [row for row in measured if row not in main]
    if others:
        parts += ["### Every other case", LEGEND, _rows(others)]
    if losses := [row for row in measured if row.ratio < LOSS and row.rival != GEMM]:
        parts += ["### Where the rival is faster", _losses(losses, len(measured))]
    if (path := picture(machine, "over-time")) in drawn:
        parts += ["### Over time", f"![Times of the main workload by date]({path.as_posix()})", _over_time(records)]
    if record.checks:
        checks = [[plain(c.name), plain(c.candidate), c.status, plain(c.message)] for c in record.checks]
        parts += ["### Checks", table(["check", "kernel", "status", "message"], checks, left=4)]
    if record.profile:
        rows = [
            [name, plain(kernel), str(calls), f"{ms:.3f}"]
            for name, kernels in record.profile.items()
            for kernel, calls, ms in kernels
        ]
        parts += ["### Where the time goes", table(["candidate", "GPU kernel", "calls", "ms"], rows, left=2)]
    without = [row for row in record.rows if row.status != "measured"]
    if without:
        parts += ["### Cases without a figure", _without(without)]
    return parts


def headline(record: Record) -> list[Row]:
    """Returns the rows that answer the first question: layers of the main size beside nn.GRU, fp32 if there is any.

    At most `MOST_ROWS` combinations of batch and mode; of several candidates at one of them the fastest.
    """
    rows = plots.main_rows(record)
    precisions = {row.precision for row in rows}
    first = next((name for name in ("fp32", "tf32", "bf16", "fp16", "default") if name in precisions), None)
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = row.batch, row.mode, row.threads, row.clock
        if row.precision == first and (key not in best or row.ours_ms < best[key].ours_ms):
            best[key] = row
    batches = sorted({row.batch for row in best.values()})
    while len(batches) > MOST_ROWS // 2:
        # The ends and the main workload stay.
        batches.pop(next(i for i in range(1, len(batches) - 1) if batches[i] != 64))
    return [row for row in best.values() if row.batch in batches]


def answer(machine: str, record: Record, rows: Sequence[Row]) -> str:
    """Returns in a sentence or two whether BiGRU is faster than nn.GRU, where and by how much."""
    clocks = {row.clock for row in rows}
    judged = [row for row in rows if row.clock == ("gpu" if "gpu" in clocks else "wall")]
    words = []
    for mode in ("forward", "training"):
        if ratios := [row.ratio for row in judged if row.mode == mode]:
            ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios)))
            words.append(f"{' to '.join(ends)} times as fast in {mode}")
    batches = sorted({row.batch for row in rows})
    across = f"B={batches[0]}" if len(batches) == 1 else f"from B={batches[0]} to B={batches[-1]}"
    names = sorted({row.candidate for row in judged})
    backend = f"backend {code(names[0])}" if len(names) == 1 else f"backends {' and '.join(map(code, names))}"
    lost = sum(row.ratio < LOSS for row in judged)
    where = f"slower by more than 5 % in {lost or 'none'} of {len(judged)} cases"
    incomplete = "" if record.complete else " The run ended before its last case."
    return (
        f"**On {plain(machine)}, `BiGRU` ({backend}) is {' and '.join(words)} beside `torch.nn.GRU`** "
        f"{across}, {where}: two layers, both directions, T=60, I=84, H=128, {rows[0].precision}, equal weights and "
        f"inputs, in turn in the same rounds.{incomplete}"
    )


def _headline_table(rows: Sequence[Row]) -> str:
    columns = sorted({(row.threads or 0, list(CLOCKS).index(row.clock), plots.column(row)) for row in rows})
    lines = []
    for mode, batch in sorted({(row.mode, row.batch) for row in rows}):
        cells = {plots.column(row): row for row in rows if (row.mode, row.batch) == (mode, batch)}
        lines.append([mode, str(batch), *(_cell(cells.get(name)) for *_, name in columns)])
    headers = ["", "B", *(f"{name}: times as fast (ms against nn.GRU's)" for *_, name in columns)]
    return table(headers, lines, left=1)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = f"**{row.ratio:.2f}**" if row.ratio >= 1 / LOSS else f"{row.ratio:.2f}"
    return f"{ratio} ({significant(row.ours_ms)} against {significant(row.rival_ms)})"


def _rows(rows: Sequence[Row]) -> str:
    headers = ["work", "candidate", "rival", "B", "T", "H", "precision", "clock", "ms", "rival, ms"]
    headers += ["times as fast", "quartiles", "error"]
    cells = [
        [
            *(f"{row.group}, {row.mode}", plain(row.candidate), plain(row.rival)),
            *(str(row.batch), str(row.steps), str(row.hidden), row.precision, plots.column(row)),
            *(significant(row.ours_ms), significant(row.rival_ms), f"{row.ratio:.2f}"),
            *(f"{row.low:.2f} to {row.high:.2f}", "-" if row.error is None else f"{row.error:.0e}"),
        ]
        for row in rows
    ]
    return table(headers, cells, left=3)


def _losses(rows: Sequence[Row], count: int) -> str:
    """Names the losses, worst first; their figures stand in the tables above."""
    worst = sorted(rows, key=lambda row: row.ratio)
    lines = [
        f"- {row.group}, {row.mode}, B={row.batch} T={row.steps} H={row.hidden} {row.precision}, "
        f"{plain(row.candidate)} beside {plain(row.rival)}, {plots.column(row)}: {row.ratio:.2f}"
        for row in worst[:20]
    ]
    more = f" The {len(lines)} worst:" if len(lines) < len(rows) else ""
    return blocks(f"{len(rows)} of {count} figures have a ratio below {LOSS}.{more}", "\n".join(lines))


def _over_time(records: Sequence[Record]) -> str:
    dated = sorted(records, key=lambda record: record.date)[-5:]
    keys: dict[str, dict[str, Row]] = {}
    for record in dated:
        for row in headline(record):
            if row.batch == 64:
                keys.setdefault(f"{row.mode}, {plots.column(row)}", {})[record.date] = row
    cells = [[name, *(_cell(rows.get(record.date)) for record in dated)] for name, rows in keys.items()]
    return table(["main workload", *(record.date[:10] for record in dated)], cells, left=1)


def _without(rows: Sequence[Row]) -> str:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row.group} {row.mode} B={row.batch} T={row.steps} H={row.hidden} {row.precision}"
        reasons.setdefault(f"**{plain(row.candidate)}**, {row.status}: {plain(row.message)}", []).append(where)
    return "\n".join(f"- {why} ({len(cases)}): {'; '.join(cases)}" for why, cases in reasons.items())


def _under(record: Record) -> str:
    """Returns what stands beneath figures: machine, date, versions and command."""
    known = ", ".join(
        f"{name} {value}" for name, value in record.machine.items() if name != "name" and value is not None
    )
    versions = ", ".join(f"{name} {value}" for name, value in record.versions.items() if value is not None)
    about = plain(f"{record.machine['name']}{f' ({known})' if known else ''}, {record.date[:10]}; {versions}")
    return f"<sub>{about}; medians, quartiles in the record; {code(record.command)}</sub>"


def _records(records: Sequence[Record], broken: Mapping[str, str], folder: str) -> str:
    shown = {own[-1].name for own in by_machine(records).values()}
    rows = [
        [f"[{record.name}]({folder}/{record.name})", plain(str(record.machine["name"])), record.date[:10], use]
        for record in records[::-1]
        for use in ["shown" if record.name in shown else "over time"]
    ]
    rows += [[plain(name), "-", "-", f"**broken**, left out: {plain(why)}"] for name, why in broken.items()]
    return table(["file", "machine", "date", "use"], rows, left=4)


def significant(value: float | None, digits: int = 3) -> str:
    """Returns a number with so many significant digits, whole ones never cut; a dash for None."""
    if value is None or not math.isfinite(value):
        return "-"
    # Rounded first, so that 9.996 becomes 10.0 and not 10.00.
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0, 1 a record is broken and left out, 2 nothing was written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write the performance document and its plots from the records of the benchmarks.",
        epilog="Exits with 1 if a record is broken: it is left out, and named here and in the document.",
    )
    folder, out = Path("benchmarks/results"), Path("PERFORMANCE.md")
    parser.add_argument("--results", type=Path, default=folder, help="folder of records (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=out, help="the document (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        written, broken = write_performance(options.results, options.out)
    except (RecordError, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(*written, sep="\n")
    for name, reason in broken.items():
        print(f"benchmarks.report: {options.results / name}: broken, left out: {reason}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
