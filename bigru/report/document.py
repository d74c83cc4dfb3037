"""The Markdown document: the published sections of a run, and after them what the published document lacks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tabulate import tabulate

from bigru.files import ESCAPE, write_atomically
from bigru.report import breakdown, breakdown_figures, comparison, comparison_figures, figures
from bigru.report.fields import RunError
from bigru.report.markdown import blocks, code, listed, plain, table
from bigru.report.record import MEASURES, PUBLISHED_COLUMNS, RunRecord, Scores, read_run

try:
    import fcntl
except ImportError:
    # Windows has none.
    fcntl = None  # type: ignore[assignment]

DOCUMENT = "results_bigru.md"
TITLE = "# BIGRU Performance"
ALL_RUNS = "all runs"
"""Marks the comparison of the runs in the folder."""

PUBLISHED_WINDOWS = {"observed": 60, "predicted": 60, "stride": 15}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes a run's section of `results_bigru.md` and its pictures, from the run folder alone.

    The first run makes the document; a further run is appended; a run already in the document is replaced where it
    stands, so that reporting twice changes nothing. All other text in the document is kept.

    Arguments:
        run: the folder of a finished run, `<out>/<stamp>`.
        out: folder for the document and its `plots`; default: the parent of `run`.

    Returns:
        the path of the document.

    Raises:
        RunError: the folder is not a finished run, or the document's marks of this run are damaged.
    """
    return write_files(read_run(run), out)[0]


def write_files(record: RunRecord, out: Path | None = None) -> list[Path]:
    """Writes the document and the pictures of a run that has been read; returns their paths, the document first."""
    out = record.folder.parent if out is None else out
    document = out / DOCUMENT
    # Drawn before the lock is taken: it takes a second, in which another run may report.
    drawn = {
        "learning_curves": figures.learning_curves(record),
        "forecasts": figures.forecasts(record.samples, record.config["data"].get("centre", "frame")),
    }
    if record.horizon:
        drawn["horizon"] = breakdown_figures.horizon(record)
    if record.by_joint is not None:
        drawn["joints"] = breakdown_figures.joints(record)
    pictures = {out / _picture(record, name): figures.png(figure) for name, figure in drawn.items()}
    out.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(document):
        # Merged first: a damaged document stops the report before any file is replaced.
        try:
            existing = document.read_text(encoding="utf-8") if document.exists() else ""
        except UnicodeDecodeError as error:
            raise RunError(f"{document}: not UTF-8 text, left as it is: {error}") from error
        text = merge(existing, record, out)
        records, left_out = comparison.runs_in(record.folder.parent)
        if len(records) > 1:
            picture = "plots/all_runs_bigru_comparison.png"
            pictures[out / picture] = figures.png(comparison_figures.comparison(records))
            text = merge_comparison(text, comparison.comparison(records, picture, left_out), out)
        (out / "plots").mkdir(exist_ok=True)
        for path, content in pictures.items():
            write_atomically(path, content)
        write_atomically(document, text.encode(errors=ESCAPE))
    return [document, *pictures]


@contextmanager
def _one_at_a_time(document: Path) -> Iterator[None]:
    """Keeps other reports off a document for as long as the block runs, where the system has such locks."""
    if fcntl is None:
        yield
        return
    # A file of its own, as the document is replaced; it stays, since whoever waits for it holds it open.
    with document.with_name(f".{document.name}.lock").open("a") as lock:
        # Some network file systems have no locks: a document written without one is better than none.
        with suppress(OSError):
            # Given back when the file is closed, or its process ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def merge(existing: str, record: RunRecord, out: Path) -> str:
    """The text of the document with this run's section appended, or replaced where it stands.

    Arguments:
        existing: the document as it is, or an empty string.
        record: the run.
        out: the document's folder, from which the reprinting command is given.

    Raises:
        RunError: this run's opening and closing marks are not one pair.
    """
    # The published document glues a rule to its title.
    if not re.search(rf"^-*{TITLE}\s*$", existing, re.MULTILINE):
        existing = f"{head(record)}\n\n{existing}".rstrip() + "\n"
    described, _, _ = existing.partition("<!-- run ")
    own_model = any(block not in described for block in (_total_params(record), _breakdown(record)))
    written = section(record, out, own_model)

    own = _marked(existing, f"run {record.stamp}", out)
    if own is None:
        rule = "---\n\n" if re.search(r"^## Run at ", existing, re.MULTILINE) else ""
        # Before the comparison of all runs, where there is one.
        end, _ = _marked(existing, ALL_RUNS, out) or (len(existing), 0)
        rest = f"\n{existing[end:]}" if existing[end:] else ""
        return f"{existing[:end].rstrip()}\n\n{rule}{written}\n{rest}"
    return existing[: own[0]] + written + existing[own[1] :]


def merge_comparison(existing: str, compared: str, out: Path) -> str:
    """The text of the document with the comparison of all runs at its end, or replaced where it stands."""
    place = _marked(existing, ALL_RUNS, out)
    block = blocks(f"<!-- {ALL_RUNS} -->", "## All runs in this folder", compared, f"<!-- end of {ALL_RUNS} -->")
    if place is None:
        return f"{existing.rstrip()}\n\n{block}\n"
    return existing[: place[0]] + block + existing[place[1] :]


def _marked(text: str, name: str, out: Path) -> tuple[int, int] | None:
    """Where the part of that name begins and ends, its marks included; None where there is none."""
    opening, closing = f"<!-- {name} -->", f"<!-- end of {name} -->"
    starts = [match.start() for match in re.finditer(rf"^{opening}$", text, re.MULTILINE)]
    ends = [match.end() for match in re.finditer(rf"^{closing}$", text, re.MULTILINE)]
    if not starts and not ends:
        return None
    if len(starts) != 1 or len(ends) != 1 or ends[0] < starts[0]:
        raise RunError(
            f"{out / DOCUMENT}: expected one '{opening}' and after it one '{closing}', found {len(starts)} and "
            f"{len(ends)}; mend or remove them and report again"
        )
    return starts[0], ends[0]


def head(record: RunRecord) -> str:
    """The title and the model, which the document gives once."""
    return blocks(TITLE, _total_params(record), "## Model parameter breakdown", _breakdown(record))


def section(record: RunRecord, out: Path, own_model: bool) -> str:
    """A run between its marks; with its own model where that is not the one in the document's head."""
    model = [_total_params(record), "### Model parameter breakdown", _breakdown(record)] if own_model else []
    return blocks(
        f"<!-- run {record.stamp} -->",
        f"## Run at {record.started}",
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
        *_breakdown_sections(record),
        "### By frame rate",
        _by_frame_rate(record),
        *(["### By subtask", _by_subtask(record)] if record.by_subtask else []),
        "### Forecasts",
        f"![Forecasts]({_picture(record, 'forecasts')})",
        "### Run details",
        _details(record, out),
        f"<!-- end of run {record.stamp} -->",
    )


def _protocol(record: RunRecord) -> str:
    """What was done with the data that the published protocol does not do, from the options of the run."""
    data = record.config["data"]
    frames, published = [data.get(name) for name in PUBLISHED_WINDOWS], [*PUBLISHED_WINDOWS.values()]
    said = {
        "missing hands left out of the loss and of the per-joint error": data["mask_missing"],
        "each clip split in time order, not by participant": data.get("split") == "time",
        f"windows of {frames[0]} observed and {frames[1]} predicted frames, {frames[2]} apart": frames != published,
        f"clips resampled to {data.get('resample')} frames per second": data.get("resample") is not None,
        "hands centred on the last observed frame, not on each frame's own wrists": data.get("centre") == "last",
    }
    on = [words for words, is_on in said.items() if is_on]
    if not on:
        return "**Protocol:** as published."
    return "**Protocol:** as published, but for:\n\n" + "\n".join(f"- {words}" for words in on)


def _breakdown_sections(record: RunRecord) -> list[str]:
    sections = []
    if record.horizon:
        sections += ["### Error against horizon", breakdown.horizon(record, _picture(record, "horizon"))]
    if record.by_joint is not None:
        sections += ["### Error per joint", breakdown.joints(record, _picture(record, "joints"))]
    return sections


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
    return f"- **MPJPE**: {test.mpjpe:.3f}\n- **ADE**:   {test.ade:.3f}\n- **FDE**:   {test.fde:.3f}"


def _modalities(record: RunRecord) -> str:
    used = record.modalities
    return (
        f"- **Hands**: {used['hands']}\n- **Gaze**: {used['gaze']}\n"
        f"- **Object BBoxes**: {used['objects']}\n- **Surrogate BBoxes**: {used['surrogate']}"
    )


def _score_cells(scores: Scores) -> list[str]:
    return [f"{getattr(scores, name):,.{decimals}f}" for name, _, decimals in MEASURES]


def _comparison(record: RunRecord) -> str:
    forecasters = {"this run": record.test, **record.baselines}
    rows = [[plain(name), *_score_cells(scores)] for name, scores in forecasters.items()]
    compared = table(["Forecast", *(label for _, label, _ in MEASURES)], rows, left=1)
    return blocks(
        f"{record.test.windows:,} test windows. Lengths are in centred units, one of which is half the image in each "
        "axis; pixels are those of the 1728 x 972 image.",
        compared,
        verdict(record.test, record.baselines),
        _definitions(mask_missing=record.config["data"]["mask_missing"]),
    )


def verdict(test: Scores, baselines: dict[str, Scores]) -> str:
    """Says of each baseline on what the run does not beat it, or that it does on all; judged by figures as printed."""
    if not baselines:
        return "No baseline was recorded, so these figures stand alone."
    sentences = []
    for name, baseline in baselines.items():
        found: dict[str, list[str]] = {}
        for attribute, label, decimals in MEASURES:
            ours, theirs = (round(getattr(scores, attribute), decimals) for scores in (test, baseline))
            if not ours < theirs:
                against = f"{label} ({ours:,.{decimals}f} against {theirs:,.{decimals}f})"
                found.setdefault(_standing(ours, theirs), []).append(against)
        found = found or {"beats": ["every measure"]}
        sentences += [f'This run {standing} "{plain(name)}" on {listed(on)}.' for standing, on in found.items()]
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
        [f"{fps:g}", f"{predicted / fps:.2f}", f"{scores.windows:,}", *_score_cells(scores)]
        for fps, scores in record.by_frame_rate
    ]
    if not rows:
        return "No test window was scored."
    headers = ["fps", "horizon (s)", "windows", *(label for _, label, _ in MEASURES)]
    return blocks(
        f"The {predicted} predicted frames reach further ahead the lower the frame rate.", table(headers, rows, left=0)
    )


def _by_subtask(record: RunRecord) -> str:
    rows = [[plain(name), f"{scores.windows:,}", *_score_cells(scores)] for name, scores in record.by_subtask]
    return table(["subtask", "windows", *(label for _, label, _ in MEASURES)], rows, left=1)


def _details(record: RunRecord, out: Path) -> str:
    environment, timing, metrics = record.environment, record.timing, record.metrics
    best = record.best_epoch - 1
    versions = ", ".join(f"{name} {environment[name]}" for name in ("bigru", "python", "torch", "triton", "numpy"))
    lines = {
        "Epochs run": f"{len(metrics['epoch'])}, {'stopped early' if record.stopped_early else 'not stopped early'}",
        "Best epoch": f"{record.best_epoch}, validation MPJPE (published) {metrics['va_mpjpe'][best]:.3f}, true "
        f"per-joint error {metrics['va_joint_error'][best]:.3f} ({metrics['va_joint_error_px'][best]:.1f} px)",
        "Device": plain(environment["device"]),
        "Backend, precision": f"{plain(environment['backend'])}, {plain(environment['precision'])}",
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
        "Report again with": f"{code(f'python -m bigru.report {_as_seen_from(record.folder, out)}')}, "
        "in this document's folder",
    }
    if not record.horizon:
        lines["Not recorded"] = (
            "error against horizon, per joint and by subtask: the version that scored this run did not write them"
        )
    if record.torn_line is not None:
        lines["Left out"] = f"line {record.torn_line} of metrics.jsonl, torn when the run was killed"
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{plain(name)} {count:,}" for name, count in counts.items())


def _options(options: dict[str, object]) -> str:
    """All options as `name=value`, less those not given and the output folder, which the document itself is in."""
    given = {name: value for name, value in options.items() if value is not None and name != "out"}
    return code(" ".join(f"{name}={value}" for name, value in given.items())) if given else "none"


def _as_seen_from(folder: Path, out: Path) -> str:
    # Never as the caller spelt it: the document must not depend on the folder it was reported from.
    return Path(os.path.relpath(folder, out.resolve())).as_posix()
