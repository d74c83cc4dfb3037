"""The document of a folder: several runs and copies, broken ones, odd paths, an older document, two reports at once."""

import fcntl
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from report.documents import (
    HEAD_HEADINGS,
    LATER,
    PLOTS,
    PUBLISHED_HEAD,
    RUN_HEADINGS,
    STAMP,
    edit_summary,
    headings,
    report,
    table_under,
)

from bigru.report import RunError, write_report
from bigru.report.__main__ import main

pytestmark = pytest.mark.usefixtures("no_figures")


def test_a_second_run_has_its_section_and_the_comparison_follows(make_run):
    first = report(make_run(epochs=2))
    assert "All runs" not in first
    both = report(make_run(LATER, epochs=2))
    index = """## Runs

- [Run at 2026-11-23 22:45:00](#run-at-2026-11-23-224500): hands, test 70.4 px
- [Run at 2026-11-24 10:11:12](#run-at-2026-11-24-101112): hands, test 70.4 px
- [All of them compared](#all-runs-in-this-folder)

"""
    assert index in both
    alone = both.replace(index, "")
    assert alone.startswith(f"{first}\n---\n\n<!-- run {LATER} -->\n\n## Run at 2026-11-24 10:11:12\n")
    assert headings(both) == [
        *HEAD_HEADINGS,
        "## Runs",
        "## Run at 2026-11-23 22:45:00",
        *RUN_HEADINGS,
        "## Run at 2026-11-24 10:11:12",
        *RUN_HEADINGS,
        "## All runs in this folder",
    ]
    assert "![Comparison of runs](plots/all_runs_bigru_comparison.png)" in both
    assert [row[0] for row in table_under(both, "## All runs in this folder")[1:3]] == [f"`{STAMP}`", f"`{LATER}`"]
    assert both.endswith("\n<!-- end of all runs -->\n")


def test_another_model_is_described_in_its_own_section(make_run):
    make_run(epochs=2)
    modules = [{"module": "encoder.core", "params": 1_234_567}, {"module": "pose_head.1", "params": 0}]
    text = report(make_run(LATER, summary={"total_params": 1_234_567, "modules": modules}))
    assert text.startswith(PUBLISHED_HEAD)
    own = text[text.index(f"<!-- run {LATER} -->") :]
    assert "- **Total params:** 1.23 M" in own
    assert table_under(own, "### Model parameter breakdown") == [["Module", "Params (M)"], ["encoder.core", "1.235"]]
    assert text.count("Model parameter breakdown") == 2


def test_other_runs_that_are_broken_are_named_and_harm_nothing(make_run, caplog):
    run = make_run(epochs=2)
    alone = report(run)
    broken = make_run(LATER, epochs=2)
    edit_summary(broken, test={"mpjpe": "a | \udce4 \x1b[1m"})
    make_run("20261125_000000", epochs=2).joinpath("summary.json").unlink()
    foreign = shutil.copytree(run, run.with_name("best run"))
    path = write_report(run)
    reason = r"summary.json: mpjpe should be a number, got 'a \| \\udce4 \\x1b\[1m'"
    assert path.read_text() == alone + (
        "\n<!-- all runs -->\n\n## All runs in this folder\n\n"
        f"Left out: {LATER} ({reason}), 20261125_000000 (not finished), best run ({foreign}: a run folder's name "
        "should be letters, digits and underscores, got 'best run').\n\n<!-- end of all runs -->\n"
    )
    assert [LATER in caplog.messages[0], "best run" in caplog.messages[1], len(caplog.messages)] == [True, True, 2]


def test_a_path_that_is_not_utf_8(make_run, capsys):
    source = os.fsdecode(b"d\xe4ta|x")
    run = make_run(epochs=2, config={"data": {"data_root": source}})
    data = json.loads((run / "summary.json").read_text())["data"]
    edit_summary(run, data=data | {"source": source}, command=f"python -m bigru.train --data-root {source}")
    make_run(LATER, epochs=2)
    samples = dict(np.load(run / "samples.npz"))
    np.savez(run / "samples.npz", **samples | {"stem": np.array([source])})
    folder = Path(os.fsdecode(bytes(run.parent) + b"\xfc"))
    run.parent.rename(folder)
    assert main([str(folder / STAMP)]) == 0
    assert capsys.readouterr().out.startswith(f"{run.parent}\\xfc/results_bigru.md\n")
    text = (folder / "results_bigru.md").read_text(encoding="utf-8")
    assert r"- **Data:** d\\xe4ta\|x, split by participant" in text
    assert r"| `data_root=d\xe4ta\|x` |" in re.sub(" +", " ", text)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{STAMP}`"))
    header = next(line for line in text.splitlines() if line.startswith("| run "))
    assert len(re.findall(r"(?<!\\)\|", row)) == header.count("|")


@pytest.mark.parametrize(
    ("content", "why"),
    [("Grüße\n".encode("latin-1"), "was not written by bigru.report"), (b"<!-- run gone -->\n", "no longer there (1)")],
)
def test_an_old_document_that_says_more_is_kept(make_run, caplog, content, why):
    run = make_run(epochs=2)
    (run.parent / "results_bigru.md").write_bytes(content)
    path = write_report(run)
    assert path.read_text() == report(run)
    assert path.with_name("results_bigru.md.old").read_bytes() == content
    assert why in caplog.text
    write_report(run)
    assert path.with_name("results_bigru.md.old").read_bytes() == content


def test_a_run_that_finishes_while_another_waits_to_report_is_in_the_document(make_run):
    run = make_run(STAMP, epochs=2)
    with (run.parent / ".results_bigru.md.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=write_report, args=(run,))
        thread.start()
        # Made between drawing and the lock.
        while not (run.parent / "plots").is_dir():
            time.sleep(0.01)
        time.sleep(0.2)
        make_run(LATER, epochs=2)
    thread.join()
    text = (run.parent / "results_bigru.md").read_text()
    assert [text.count(f"\n<!-- run {stamp} -->\n") for stamp in (STAMP, LATER)] == [1, 1]


def test_a_file_system_without_locks(make_run, monkeypatch):
    def refuse(*_):
        raise OSError("Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert f"<!-- run {STAMP} -->" in write_report(make_run(epochs=2)).read_text()


def test_a_copy_of_a_run_has_its_own_section_and_pictures(make_run):
    run = make_run(epochs=2)
    copy = shutil.copytree(run, run.with_name(f"{STAMP}_copy"))
    text = write_report(copy).read_text()
    assert re.findall(r"^<!-- run (.*) -->$", text, re.MULTILINE) == [STAMP, f"{STAMP}_copy"]
    plots = {path.name for path in (run.parent / "plots").iterdir()} - {"all_runs_bigru_comparison.png"}
    assert plots == {f"{name}_bigru_{plot}.png" for name in (STAMP, f"{STAMP}_copy") for plot in PLOTS}
    assert all(f"(plots/{name})" in text for name in plots)


@pytest.mark.parametrize("name", ["best run", "20261123_224500-->", "läufe"])
def test_a_name_that_the_document_cannot_use(make_run, name):
    run = make_run()
    with pytest.raises(RunError, match=r"a run folder's name should be letters, digits and underscores, got '"):
        write_report(run.rename(run.with_name(name)))
    assert not (run.parent / "results_bigru.md").exists()


def test_out_folder(make_run, tmp_path):
    run = make_run(epochs=2)
    path = write_report(run, tmp_path / "new" / "place")
    assert path == tmp_path / "new" / "place" / "results_bigru.md"
    assert f"`python -m bigru.report ../../runs/{STAMP}`" in path.read_text()
    assert (path.parent / "plots" / f"{STAMP}_bigru_learning_curves.png").is_file()
    assert not (run.parent / "results_bigru.md").exists()
