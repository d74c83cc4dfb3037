"""Writes the Markdown document: the published sections of each run, and after them what the published one lacks."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from bigru.files import lock, printable, shell_line, write_atomically
from bigru.report import breakdown, breakdown_figures, comparison, comparison_figures, figures
from bigru.report.markdown import blocks, code, listed, plain, table
from bigru.report.record import METRICS, NETWORK, PUBLISHED, PUBLISHED_COLUMNS, RunRecord, Scores, cells, read_run

log = logging.getLogger("bigru.report")

DOCUMENT = "results_bigru.md"
TITLE = "# BIGRU Performance"
ALL_RUNS = "plots/all_runs_bigru_comparison.png"
RUN_MARK = "<!-- run "
"""The beginning of each run's section, by which the document is known as this command's own."""

PUBLISHED_WINDOWS = {"observed": 60, "predicted": 60, "stride": 15}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes `results_bigru.md` of a run and the other finished runs beside it, and the run's pictures.

    The document is written anew each time, from the run folders alone: a section a run in the order of their names,
    and a comparison where there are several. A run that is not finished or damaged is named there and in the log.

    Args:
        run: the folder of a finished run, `<out>/<stamp>`.
        out: folder for the document, whose path is returned, and its `plots`; default: the parent of `run`.

    Raises:
        RunError: the folder is not a finished run.
    """
    return write_files(read_run(run), out)[0]


def write_files(record: RunRecord, out: Path | None = None) -> list[Path]:
    """Writes the document and the pictures of a run that has been read; returns their paths, the document first."""
    out = record.folder.parent if out is None else out
    document = out / DOCUMENT
    # Drawn before the lock is taken: it takes a second, in which another run may report.
    pictures = _draw(record)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    # A file of its own, as the document is replaced; it stays, since another process may wait with it open. A document
    # written without the lock is better than none.
    with document.with_name(f".{document.name}.lock").open("a") as locked:
        lock(locked, wait=True)
        records, left_out = comparison.runs_in(record.folder.parent)
        for other in records:
            # Their own reports drew them, unless this is another folder.
            if not (out / _picture(other, "forecasts")).exists():
                pictures |= _draw(other)
        if len(records) > 1:
            pictures[ALL_RUNS] = figures.png(comparison_figures.comparison(records))
        for name, content in pictures.items():
            write_atomically(out / name, content)
        _keep_old(document, records)
        write_atomically(document, text(records, left_out, out).encode("utf-8"))
    for name, reason in left_out.items():
        if reason != comparison.NOT_FINISHED:
            log.warning("%s: left out of %s: %s", printable(name), printable(document), printable(reason))
    return [document, *(out / name for name in pictures)]


def _draw(record: RunRecord) -> dict[str, bytes]:
    """Returns the pictures of one run, as PNG, by their paths from the document."""
    drawn = {
        "learning_curves": figures.learning_curves(record),
        "forecasts": figures.forecasts(record.samples, record.config["data"]["centre"]),
        "horizon": breakdown_figures.horizon(record),
        "joints": breakdown_figures.joints(record),
    }
    return {_picture(record, name): figures.png(figure) for name, figure in drawn.items()}


def _keep_old(document: Path, records: Sequence[RunRecord]) -> None:
    """Moves a document out of the way that another program wrote, or that holds runs which are no longer there."""
    content = document.read_bytes() if document.exists() else b""
    stamps = set(re.findall(rf"{RUN_MARK}(\w+) -->".encode(), content))
    gone = stamps - {record.stamp.encode() for record in records}
    if content.strip() and (gone or not stamps):
        kept = document.with_name(f"{document.name}.old")
        document.replace(kept)
        why = f"holds runs that are no longer there ({len(gone)})" if gone else "was not written by bigru.report"
        log.warning("%s %s: it is now %s", printable(document), why, printable(kept))


def text(records: Sequence[RunRecord], left_out: Mapping[str, str], out: Path) -> str:
    """Returns the whole document.

    Args:
        records: the runs in the order of their sections; at least one. The first one's model stands in the head.
        left_out: names of runs that are not in it, and why.
        out: the document's folder, as seen from which paths are given.
    """
    sections: list[str] = []
    for record in records:
        own_model = any(part(record) != part(records[0]) for part in (_total_params, _breakdown))
        sections += ["---"] * bool(sections) + [section(record, out, own_model)]
    if len(records) > 1 or left_out:
        compared = [comparison.comparison(records, ALL_RUNS)] if len(records) > 1 else []
        reasons = ", ".join(f"{plain(name)} ({plain(reason)})" for name, reason in left_out.items())
        sections += ["<!-- all runs -->", "## All runs in this folder", *compared]
        sections += [f"Left out: {reasons}."] * bool(left_out) + ["<!-- end of all runs -->"]
    return blocks(head(records[0]), *_index(records), *sections) + "\n"


def _index(records: Sequence[RunRecord]) -> list[str]:
    """Returns links to the sections of several runs, by the names that GitHub gives their headings."""
    if len(records) < 2:
        return []
    lines, seen = [], Counter[str]()
    for record in records:
        heading = f"Run at {record.started}"
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        again = f"-{seen[anchor]}" if seen[anchor] else ""
        seen[anchor] += 1
        error = METRICS[-1].text(record.test.joint_error_px)
        lines.append(f"- [{plain(heading)}](#{anchor}{again}): {comparison.inputs(record)}, test {error} px")
    return ["## Runs", "\n".join([*lines, "- [All of them compared](#all-runs-in-this-folder)"])]


def head(record: RunRecord) -> str:
    """Returns the title and the model, which the document gives once."""
    return blocks(TITLE, _total_params(record), "## Model parameter breakdown", _breakdown(record))


def section(record: RunRecord, out: Path, own_model: bool) -> str:
    """Returns a run's section; with its own model where that is not the one in the document's head."""
    model = [_total_params(record), "### Model parameter breakdown", _breakdown(record)] if own_model else []
    return blocks(
        f"{RUN_MARK}{record.stamp} -->",
        f"## Run at {plain(record.started)}",
        *model,
        f"- **Train batch size:** {record.config['optim']['batch_size']}",
        "### Epoch-wise metrics",
        _epoch_table(record),
        "### Test Results",
        _test_results(record.test),
        "### Input Modalities Used",
        _modalities(record),
        "## Learning curves",
        f"![Performance curves]({_picture(record, 'learning_curves')})",
        "## Beyond the published report",
        _protocol(record),
        "### True per-joint error",
        _comparison(record),
        "### Error against horizon",
        breakdown.horizon(record, _picture(record, "horizon")),
        "### Error per joint",
        breakdown.joints(_picture(record, "joints")),
        "### By frame rate",
        _by_frame_rate(record),
        "### By subtask",
        _by_subtask(record),
        "### Forecasts",
        f"![Forecasts]({_picture(record, 'forecasts')})",
        "### Run details",
        _details(record, out),
        f"<!-- end of run {record.stamp} -->",
    )


def _protocol(record: RunRecord) -> str:
    """Lists from the run's options how its data differ from the published protocol's."""
    data = record.config["data"]
    frames, published = [data[name] for name in PUBLISHED_WINDOWS], [*PUBLISHED_WINDOWS.values()]
    said = {
        "missing hands left out of the loss and of the per-joint error": data["mask_missing"],
        "each clip split in time order, not by participant": data["split"] == "time",
        f"windows of {frames[0]} observed and {frames[1]} predicted frames, {frames[2]} apart": frames != published,
        f"clips resampled to {data['resample']} frames per second": data["resample"] is not None,
        "hands centred on the last observed frame, not on each frame's own wrists": data["centre"] == "last",
        "displacements from the last observed frame predicted, not the hands": record.config["model"]["residual"],
    }
    on = [words for words, is_on in said.items() if is_on]
    if not on:
        return "**Protocol:** as published."
    return "**Protocol:** as published, but for:\n\n" + "\n".join(f"- {words}" for words in on)


def _picture(record: RunRecord, name: str) -> str:
    return f"plots/{record.stamp}_bigru_{name}.png"


def _total_params(record: RunRecord) -> str:
    return f"- **Total params:** {record.total_params / 1e6:.2f} M"


def _breakdown(record: RunRecord) -> str:
    # The published table leaves out what has no parameters, the dropout.
    rows = [(plain(module), params / 1e6) for module, params in record.modules if params]
    return tabulate(rows, headers=("Module", "Params (M)"), tablefmt="pipe", floatfmt=".3f")


def _epoch_table(record: RunRecord) -> str:
    columns = ("epoch", *PUBLISHED_COLUMNS)
    rows = list(zip(*(record.metrics[name] for name in columns), strict=True))
    return tabulate(rows, headers=columns, tablefmt="pipe", floatfmt=".3f")


def _test_results(test: Scores) -> str:
    return "\n".join(f"- {f'**{metric.short}**:':10} {metric.text(metric.of(test))}" for metric in PUBLISHED)


def _modalities(record: RunRecord) -> str:
    used = record.modalities
    return (
        f"- **Hands**: {used['hands']}\n- **Gaze**: {used['gaze']}\n"
        f"- **Object BBoxes**: {used['objects']}\n- **Surrogate BBoxes**: {used['surrogate']}"
    )


def _comparison(record: RunRecord) -> str:
    forecasters = {NETWORK: record.test, **record.baselines}
    rows = [[plain(name), *cells(scores)] for name, scores in forecasters.items()]
    compared = table(["Forecast", *(metric.label for metric in METRICS)], rows, left=1)
    return blocks(
        f"{record.test.windows:,} test windows. Lengths are in centred units, one of which is half the image in each "
        "axis; pixels are those of the 1728 x 972 image.",
        compared,
        verdict(record.test, record.baselines),
        _definitions(mask_missing=record.config["data"]["mask_missing"]),
    )


def verdict(test: Scores, baselines: dict[str, Scores]) -> str:
    """Says of each baseline which measures the network does not beat it on, if any; judged by figures as printed."""
    sentences = []
    for name, baseline in baselines.items():
        found: dict[str, list[str]] = {}
        for metric in METRICS:
            ours, theirs = (round(metric.of(scores), metric.decimals) for scores in (test, baseline))
            if not ours < theirs:
                against = f"{metric.label} ({metric.text(ours)} against {metric.text(theirs)})"
                found.setdefault(_standing(ours, theirs), []).append(against)
        found = found or {"beats": ["every measure"]}
        sentences += [
            f'{NETWORK.capitalize()} {standing} "{plain(name)}" on {listed(on)}.' for standing, on in found.items()
        ]
    return " ".join(sentences)


def _standing(ours: float, theirs: float) -> str:
    if ours > theirs:
        return "loses to"
    # What is neither larger, smaller nor equal is NaN.
    return "is level with" if ours == theirs else "cannot be compared with"


def _definitions(mask_missing: bool) -> str:
    as_zeros = "count with the zeros they are stored as"
    missing = "are left out" if mask_missing else as_zeros
    return "\n".join(
        (
            "- **MPJPE (published):** the L2 norm over the whole 84-vector of a frame, averaged over frames. It takes "
            f"all 42 joints as one length, so it is no distance of any joint; missing hands {as_zeros}.",
            "- **ADE, FDE:** the distance between the predicted and the true centroid of the 42 joints, averaged over "
            "the predicted frames (ADE), or at the last one (FDE).",
            "- **Per-joint error:** the distance of each joint, then the mean over joints and frames; joints of "
            f"missing hands {missing}.",
            "- **Train columns (tr\\_):** taken while training, with dropout on and the weights moving; they are not "
            "comparable with the validation columns (va\\_).",
        )
    )


def _by_frame_rate(record: RunRecord) -> str:
    predicted = record.config["data"]["predicted"]
    rows = [
        [f"{fps:g}", f"{predicted / fps:.2f}", f"{scores.windows:,}", *cells(scores)]
        for fps, scores in record.by_frame_rate
    ]
    headers = ["fps", "horizon (s)", "windows", *(metric.label for metric in METRICS)]
    texts = [
        f"The {predicted} predicted frames reach further ahead the lower the frame rate.",
        table(headers, rows, left=0),
    ]
    if assumed := [f"{windows:,} at {fps:g} fps" for fps, windows in record.assumed_rates]:
        texts.append(
            "Windows whose frame rate is assumed, as documented for the participant, since their clips' timestamps "
            f"tell none: {', '.join(assumed)}."
        )
    return blocks(*texts)


def _by_subtask(record: RunRecord) -> str:
    rows = [[plain(name), f"{scores.windows:,}", *cells(scores)] for name, scores in record.by_subtask]
    return table(["subtask", "windows", *(metric.label for metric in METRICS)], rows, left=1)


def _details(record: RunRecord, out: Path) -> str:
    environment, timing, metrics = record.environment, record.timing, record.metrics
    best = record.best_epoch - 1
    folder = shell_line([_as_seen_from(record.folder, out)])
    versions = ", ".join(f"{name} {environment[name]}" for name in ("bigru", "python", "torch", "triton", "numpy"))
    lines = {
        "Epochs run": f"{len(metrics['epoch'])}, {_stop(record)}",
        "Best epoch": f"{record.best_epoch}, validation MPJPE (published) {metrics['va_mpjpe'][best]:.3f}, true "
        f"per-joint error {metrics['va_joint_error'][best]:.3f} ({metrics['va_joint_error_px'][best]:.1f} px)",
        "Device": plain(environment["device"]),
        "Backend, precision": f"{plain(environment['backend'])}, {plain(environment['precision'])}",
        "Chosen as": plain(environment["why"]),
        "Versions": plain(versions),
        "Platform": plain(environment["platform"]),
        "Data": f"{plain(record.source)}, split by {plain(record.split)}",
        "Clips": _counted(record.clips),
        "Windows": _counted(record.windows),
        "Clips skipped": _counted(record.skipped) or "none",
        "Time per epoch": f"{timing['epoch_s_median']:,.2f} s (median)",
        "Training speed": f"{timing['train_windows_per_s_median']:,.0f} windows/s (median)",
        "Wall time": f"{timing['total_s']:,.0f} s ({timing['total_s'] / 60:,.1f} min)",
        **{f"Options, {group}": _options(options) for group, options in record.config.items()},
        "Run again with": code(record.command),
        "Report again with": f"{code(f'python -m bigru.report {folder}')}, in this document's folder",
    }
    if record.finished_before:
        lines["Trained on"] = (
            f"after epoch {listed([*map(str, record.finished_before)])}, where it had finished by fewer epochs; from "
            "there on the learning rate is that of all its epochs, so that it rises there"
        )
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


def _stop(record: RunRecord) -> str:
    if not record.stopped_early:
        return "not stopped early"
    optim = record.config["optim"]
    # Else a best epoch just before the last one looks like a fault.
    return (
        f"stopped early: no gain of {optim['min_delta']} in validation MPJPE in {optim['patience']} epochs; "
        "the best epoch is that of the least MPJPE, however small its gain"
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{plain(name)} {count:,}" for name, count in counts.items())


def _options(options: dict[str, object]) -> str:
    """Returns all options as `name=value`, less those not given and the output folder, where the document is."""
    given = {name: value for name, value in options.items() if value is not None and name != "out"}
    return code(" ".join(f"{name}={value}" for name, value in given.items())) if given else "none"


def _as_seen_from(folder: Path, out: Path) -> str:
    # Never as the caller spelt it: the document must not depend on the folder it was reported from.
    return Path(os.path.relpath(folder, out.resolve())).as_posix()
