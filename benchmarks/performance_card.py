"""What the performance document says of one card: a section each for what was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import performance_figures as plots
from benchmarks.markdown import significant, under
from benchmarks.measured import MEASURES, MODES, OURS, PEER, Correctness, GpuRecord, Timing, size
from benchmarks.performance_figures import versions
from bigru.report.markdown import blocks, code, plain, table

IMAGES = Path("docs/images/performance")
"""Where the plots go, seen from the document's folder."""
LOSS = 0.95
"""A ratio to nn.GRU below this one is a loss: nearer to 1 it may be the noise of the measurement."""
REGRESSION = 1.05
"""A time above this multiple of the one before is set in bold."""
COLUMNS = 5
"""How many dates the table over time shows; the figure shows all."""

Plots = dict[str, Figure]


def card_sections(records: Sequence[GpuRecord], drawn: Plots) -> str:
    """Everything about one card, from the first of its records; the others count for the section over time."""
    record = records[0]
    parts = [f"## {plain(record.card)}", _machine(record)]
    for heading, write in SECTIONS.items():
        parts += [f"### {heading}", write(record, drawn)]
    return blocks(*parts, "### Over time", _over_time(records, drawn))


def _machine(record: GpuRecord) -> str:
    known = {"Card": record.card, **record.machine, "Versions": versions(record)}
    if record.facts:
        known["Facts"] = ", ".join(f"{name} {significant(value)}" for name, value in record.facts.items())
    lines = [f"- **{name}:** {plain(text)}" for name, text in known.items()]
    lines.append(f"- **Record:** {record.date:%Y-%m-%d %H:%M} UTC, {code(record.command)}, {record.seconds:,.0f} s")
    if record.missing_facts:
        missing = "; ".join(f"{name}: {why}" for name, why in record.missing_facts.items())
        lines.append(f"- **Facts not measured:** {plain(missing)}")
    if not record.complete:
        lines.append("- **Incomplete:** the run ended before its last row; there is no complete record of this card.")
    return "\n".join(lines)


def _under(record: GpuRecord, precision: str = "as in the table") -> str:
    """Machine, date, versions, precision and command, to stand beneath a table or a plot."""
    return under(f"{record.card}, {record.date:%Y-%m-%d}; {versions(record)}; precision {precision}", record.command)


def _plot(name: str, caption: str, figure: Figure | None, record: GpuRecord, drawn: Plots) -> list[str]:
    """The picture and what stands beneath it, or nothing where there was nothing to draw."""
    if figure is None:
        return []
    file = f"{_slug(record.card)}-{name}"
    drawn[file] = figure
    return [f"![{caption}]({(IMAGES / file).as_posix()}.png)", _under(record, "as named in the plot")]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _error(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def _by_mode(rows: Sequence[Timing]) -> list[Timing]:
    return sorted(rows, key=lambda row: (MODES.index(row.work.mode), plots.path_order(row.path)))


def _figure_cells(record: GpuRecord, row: Timing) -> list[str]:
    """Time and ratio in each of the three measures, or the reason and dashes."""
    if row.status != "measured":
        return [plain(row.reason), *["-"] * (len(MEASURES) - 1)]
    return [_with_ratio(record, row, measure) for measure in MEASURES]


def _with_ratio(record: GpuRecord, row: Timing, measure: str) -> str:
    time, ratio = getattr(row, measure), record.ratio(row, measure)
    if math.isnan(time) or row.path == PEER:
        return significant(time)
    return f"{significant(time)} ({'no peer' if math.isnan(ratio) else f'{significant(ratio)}x'})"


def _main_workload(record: GpuRecord, drawn: Plots) -> str:
    parts = []
    for work in ("forward", "forward+backward"):
        rows = [row for row in record.select("layer", work) if row.work.shape.is_main]
        if rows:
            parts += [f"**{work}**", _main_table(record, rows), _under(record)]
    return blocks(*parts) if parts else "Not measured in this record."


def _main_table(record: GpuRecord, rows: Sequence[Timing]) -> str:
    headers = ["precision", "path", *(f"{label}, ms (ratio)" for label in MEASURES.values())]
    cells = [
        [
            row.work.mode,
            plain(row.path),
            *_figure_cells(record, row),
            _quartiles(row),
            _error(row.error),
            significant(row.peak_mib),
        ]
        for row in _by_mode(rows)
    ]
    return table([*headers, "GPU time, quartiles", "error", "peak MiB"], cells, left=2)


def _quartiles(row: Timing) -> str:
    return " to ".join(map(significant, row.quartiles["gpu_ms"])) if "gpu_ms" in row.quartiles else "-"


def _speed(record: GpuRecord, drawn: Plots) -> str:
    parts = []
    for work in ("forward", "forward+backward"):
        caption = f"Speed against nn.GRU, {work}"
        parts += _plot(f"speed-{_slug(work)}", caption, plots.speed(record, work), record, drawn)
    return blocks(*parts) if parts else "Not measured in this record."


def _time_per_step(record: GpuRecord, drawn: Plots) -> str:
    parts = []
    for group, work in (
        ("recurrence", "forward"),
        ("recurrence", "backward"),
        ("layer", "forward"),
        ("layer", "forward+backward"),
    ):
        caption = f"Time per step of the {group}, {work}"
        figure = plots.steps(record, group, work)
        parts += _plot(f"steps-{_slug(f'{group} {work}')}", caption, figure, record, drawn)
    alone = [row for row in record.select("recurrence") if row.work.shape.is_main_step]
    if alone:
        parts = ["**The recurrence of one layer, main workload**", _step_table(alone), _under(record), *parts]
    if not parts:
        return "Not measured in this record."
    return blocks(
        "In the plots one size varies at a time, the others are the main workload's. The floor is the least that the "
        "dependent steps of the recurrence take on this card, by the record; it has none for some shapes.",
        *parts,
    )


def _step_table(rows: Sequence[Timing]) -> str:
    cells = []
    for row in sorted(_by_mode(rows), key=lambda row: row.work.work, reverse=True):
        per_step, floor = (plots.per_step_us(ms, row.work.shape) for ms in (row.gpu_ms, row.floor_ms))
        times = row.gpu_ms / row.floor_ms
        found = [significant(row.gpu_ms), *map(significant, (per_step, floor, times))]
        if row.status != "measured":
            found = [plain(row.reason), *["-"] * 3]
        cells.append([row.work.work, row.work.mode, plain(row.path), *found, _error(row.error)])
    headers = ["work", "precision", "path", "GPU time, ms", "µs per step", "floor, µs per step", "times the floor"]
    return table([*headers, "error"], cells, left=3)


def _memory(record: GpuRecord, drawn: Plots) -> str:
    parts = _plot("memory", "Peak memory of forward and backward", plots.memory(record), record, drawn)
    return blocks(*parts) if parts else "Not measured over several sizes in this record; see the main workload."


def losses(record: GpuRecord) -> list[Timing]:
    """Our timings that nn.GRU beats in any measure, worst first."""
    lowest = {(row.work, row.path): min(ratios) for row in record.timings.values() if (ratios := _ratios(record, row))}
    found = [key for key, ratio in lowest.items() if ratio < LOSS]
    return [record.timings[key] for key in sorted(found, key=lambda key: lowest[key])]


def _ratios(record: GpuRecord, row: Timing) -> list[float]:
    """One of our paths' ratios to nn.GRU in each measure that both were measured in; none of another path."""
    ratios = [record.ratio(row, measure) for measure in MEASURES] if row.path in OURS else []
    return [ratio for ratio in ratios if not math.isnan(ratio)]


def _losses(record: GpuRecord, drawn: Plots) -> str:
    compared = sum(bool(_ratios(record, row)) for row in record.timings.values())
    if not compared:
        return "Not measured in this record."
    if not (found := losses(record)):
        return f"Nowhere: no ratio is below {LOSS} in {compared} rows."
    cells = [
        [
            f"{row.work.group}, {row.work.work}",
            plots.shape_name(row.work.shape),
            row.work.mode,
            row.path,
            *(_marked(record.ratio(row, measure)) for measure in MEASURES),
            _best(record, row),
        ]
        for row in found
    ]
    headers = [
        "work",
        "shape",
        "precision",
        "path",
        *(f"{label}, ratio" for label in MEASURES.values()),
        "best of ours, GPU time",
    ]
    return blocks(
        f"Each row of our paths with a ratio below {LOSS} (bold), worst first: {len(found)} of {compared} compared. "
        "The last column is our fastest path there.",
        table(headers, cells, left=4),
        _under(record),
    )


def _marked(ratio: float) -> str:
    text = "-" if math.isnan(ratio) else f"{significant(ratio)}x"
    return f"**{text}**" if ratio < LOSS else text


def _best(record: GpuRecord, loss: Timing) -> str:
    """Our path with the least GPU time at the same work, and its ratio."""
    rivals = [record.timings[loss.work, path] for path in OURS if (loss.work, path) in record.timings]
    rivals = [row for row in rivals if not math.isnan(record.ratio(row, "gpu_ms"))]
    if not rivals:
        return "-"
    best = min(rivals, key=lambda row: row.gpu_ms)
    return f"{best.path} {significant(record.ratio(best, 'gpu_ms'))}x"


def _training(record: GpuRecord, drawn: Plots) -> str:
    parts = []
    for group, unit in (("training step", "windows/s"), ("epoch", "epochs/h")):
        if not (rows := record.select(group)):
            continue
        cells = [
            [
                plots.shape_name(row.work.shape),
                row.work.mode,
                plain(row.path),
                *_figure_cells(record, row),
                _throughput(row, "eager_ms"),
                _throughput(row, "graph_ms"),
                _error(row.error),
                significant(row.peak_mib),
            ]
            for row in sorted(_by_mode(rows), key=lambda row: plots.shape_name(row.work.shape))
        ]
        headers = [
            "shape",
            "precision",
            "path",
            *(f"{label}, ms (ratio)" for label in MEASURES.values()),
            f"{unit} eager",
            f"{unit} graph",
            "error",
            "peak MiB",
        ]
        parts += [f"**{group}**", table(headers, cells, left=3), _under(record)]
    return blocks(*parts) if parts else "Not measured in this record."


def _throughput(row: Timing, measure: str) -> str:
    """Windows a second of a step, epochs an hour of an epoch."""
    count = 3600 if row.work.group == "epoch" else row.work.shape.batch
    return "-" if count is None else significant(1e3 * count / getattr(row, measure))


def _correctness(record: GpuRecord, drawn: Plots) -> str:
    if not record.correctness:
        return "Not measured in this record."
    groups: dict[tuple[str, str], list[Correctness]] = {}
    for row in record.correctness:
        groups.setdefault((row.kernel, row.mode), []).append(row)
    headers = [
        "kernel",
        "precision",
        "rows",
        "passed",
        "failed",
        "refused",
        "same bits again",
        "worst error",
        "tolerance",
        "of",
        "at",
    ]
    cells = [_summary([kernel, mode], rows) for (kernel, mode), rows in groups.items()]
    parts = [
        "Outputs and every gradient against fp64, norm-relative. The worst error is that of all rows that ran.",
        table(headers, cells, left=2),
        _under(record),
    ]
    if failed := [row for row in record.correctness if row.status == "failed"]:
        parts += [
            "**Failed**",
            "\n".join(f"- {_case(row)}: {plain(row.message) or 'no reason given'}" for row in failed),
        ]
    if record.unchecked:
        rest = ", ".join(f"{plain(what)} ({count})" for what, count in record.unchecked.items())
        parts.append(f"**No time was left for** {rest}.")
    # A record is not believed where its own figures say otherwise.
    if doubtful := [row for row in record.correctness if row.status == "passed" and not row.worst[1] <= row.tolerance]:
        lines = (f"- {_case(row)}: {row.worst[1]:.1e} of {_error(row.tolerance)}" for row in doubtful)
        parts += ["**Recorded as passed with an error that is not within the tolerance**", "\n".join(lines)]
    return blocks(*parts)


def _summary(names: list[str], rows: Sequence[Correctness]) -> list[str]:
    counts = [sum(row.status == status for row in rows) for status in ("passed", "failed", "refused")]
    repeated = [row.deterministic for row in rows if row.deterministic is not None and row.status != "refused"]
    cells = [*map(plain, names), *map(str, (len(rows), *counts)), f"{sum(repeated)} of {len(repeated)}"]
    if not (ran := [row for row in rows if row.errors and row.status != "refused"]):
        return [*cells, "-", "-", "-", "-"]
    worst = max(ran, key=lambda row: size(row.worst[1]))
    name, error = worst.worst
    return [*cells, f"{error:.1e}", _error(worst.tolerance), plain(name), plots.shape_name(worst.shape)]


def _case(row: Correctness) -> str:
    bias = "bias" if row.bias else "no bias"
    return f"{plain(row.kernel)}, {row.mode}, {plots.shape_name(row.shape)}, {bias}"


def _checks(record: GpuRecord, drawn: Plots) -> str:
    if not record.checks:
        return "Not measured in this record."
    cells = [
        [
            plain(check.name),
            plain(check.kernel) or "-",
            check.mode or "all",
            plots.shape_name(check.shape) or "-",
            check.status,
            plain(check.message) or "-",
        ]
        for check in record.checks
    ]
    return blocks(
        "A planted defect passes when the tests find it.",
        table(["check", "kernel", "precision", "shape", "status", "message"], cells, left=6),
        _under(record),
    )


def _without_figure(record: GpuRecord, drawn: Plots) -> str:
    if not record.timings:
        return "Not measured in this record."
    reasons: dict[tuple[str, str], list[Timing]] = {}
    for row in record.timings.values():
        if row.status != "measured":
            reasons.setdefault((row.path, row.reason), []).append(row)
    if not reasons:
        return f"None: all {len(record.timings)} rows were measured."
    # No table: the lists of shapes are long.
    lines = (
        f"- **{plain(path)}**, {plain(reason)} ({len(rows)} of {len(record.timings)} rows): {_where(rows)}"
        for (path, reason), rows in reasons.items()
    )
    return blocks("\n".join(lines), _under(record, "as named"))


def _where(rows: Sequence[Timing]) -> str:
    """Work and shape of each row, with the precisions in brackets."""
    modes: dict[str, list[str]] = {}
    for row in rows:
        place = f"{row.work.group}, {row.work.work}, {plots.shape_name(row.work.shape)}"
        modes.setdefault(place, []).append(row.work.mode)
    return "; ".join(f"{place} ({', '.join(found)})" for place, found in modes.items())


SECTIONS: dict[str, Callable[[GpuRecord, Plots], str]] = {
    "Main workload": _main_workload,
    "Speed against nn.GRU": _speed,
    "Time per step": _time_per_step,
    "Memory": _memory,
    "Where nn.GRU wins": _losses,
    "Training": _training,
    "Correctness": _correctness,
    "Checks": _checks,
    "Rows without a figure": _without_figure,
}
"""What is said of a card, in this order; each from its record, with the plots it draws put into the second argument."""


def _over_time(records: Sequence[GpuRecord], drawn: Plots) -> str:
    if len(records) < 2:
        return "One record of this card so far; a second one will show what changed."
    dated = sorted(records, key=lambda record: record.date)
    works: dict[tuple[str, str, str, str], dict[int, Timing]] = {}
    for at, record in enumerate(dated):
        for row in record.timings.values():
            if row.work.shape.is_main and row.work.group in ("layer", "training step"):
                key = (row.work.group, row.work.work, row.work.mode, row.path)
                works.setdefault(key, {})[at] = row
    shown = range(max(0, len(dated) - COLUMNS), len(dated))
    cells = []
    for (group, work, mode, path), rows in sorted(works.items(), key=lambda item: _series_order(*item[0])):
        times = [_then(rows.get(at), dated[at]) for at in shown]
        cells.append([f"{group}, {work}", mode, plain(path), *times, _change(rows, len(dated) - 1)])
    days = [f"{dated[at].date:%Y-%m-%d}" for at in shown]
    if len(set(days)) < len(days):
        days = [f"{dated[at].date:%Y-%m-%d %H:%M}" for at in shown]
    parts = [
        "Main workload, GPU time in ms (ratio to nn.GRU in the same record). The change is that to the newest "
        f"record from the one before it that measured the row; slower by more than {REGRESSION - 1:.0%} is bold.",
        table(["work", "precision", "path", *days, "change"], cells, left=3),
        "<br>".join(_under(dated[at]) for at in shown),
    ]
    return blocks(*parts, *_plot("history", "Main workload over time", plots.history(dated), dated[-1], drawn))


def _series_order(group: str, work: str, mode: str, path: str) -> tuple[str, str, int, tuple[int, str]]:
    return group, work, MODES.index(mode), plots.path_order(path)


def _then(row: Timing | None, record: GpuRecord) -> str:
    if row is None:
        return "-"
    return _with_ratio(record, row, "gpu_ms") if row.status == "measured" else row.status


def _change(rows: dict[int, Timing], newest: int) -> str:
    """From the last but one time to that of the newest record, or a dash where it has none."""
    times = [rows[at].gpu_ms for at in sorted(rows) if not math.isnan(rows[at].gpu_ms)]
    if len(times) < 2 or newest not in rows or math.isnan(rows[newest].gpu_ms):
        return "-"
    factor = times[-1] / times[-2]
    text = f"{100 * (factor - 1):+.1f} %"
    return f"**{text}**" if factor > REGRESSION else text
