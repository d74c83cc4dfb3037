"""A run folder's files against everything that can break in them, and what the command says of it."""

import json
import re

import numpy as np
import pytest
from report.documents import PLOTS

from bigru.report import RunError, write_report
from bigru.report.__main__ import main
from bigru.report.record import read_run

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.mark.parametrize(
    ("line", "broken", "message"),
    [
        pytest.param(3, '{"epoch": 3, "tr_m', r"metrics\.jsonl:3: not valid JSON", id="torn in the middle"),
        pytest.param(6, '{"epoch": 6, "tr_m', r"metrics\.jsonl:6: not valid JSON", id="broken but ended"),
        pytest.param(3, "[3]", r"metrics\.jsonl:3: expected a JSON object", id="no object"),
        pytest.param(3, '{"epoch": 3}', r"metrics\.jsonl:3: tr_mpjpe is missing", id="missing metric"),
        pytest.param(3, '{"epoch": 3, "tr_mpjpe": "1"}', r":3: tr_mpjpe should be a number, got '1'", id="string"),
        pytest.param(3, '{"epoch": 2}', r"metrics\.jsonl:3: expected epoch 3, got epoch 2", id="epoch twice"),
        pytest.param(3, "", r"metrics\.jsonl:3: not valid JSON", id="blank"),
    ],
)
def test_broken_metrics_are_named_with_their_line(make_run, line, broken, message):
    run = make_run(epochs=6)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[line - 1] = broken
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=message):
        read_run(run)


def test_run_without_an_epoch(make_run):
    with pytest.raises(RunError, match="no complete epoch"):
        read_run(make_run(metrics=[]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"format": 3}, r"summary\.json: format 3 is not known; .* reads 2", id="format"),
        pytest.param({"by_joint": {"joint_error": [1.0] * 42}}, r"joint_error_px is missing", id="by joint"),
        pytest.param({"best_epoch": 7}, r"best_epoch is 7, but metrics\.jsonl holds epochs 1 to 6", id="best epoch"),
        pytest.param({"test": {"mpjpe": 1.0}}, r"summary\.json: ade is missing", id="score missing"),
        pytest.param({"by_frame_rate": [{"fps": 0}]}, r"summary\.json: mpjpe is missing", id="frame rate"),
        pytest.param({"modules": ["a"]}, r"summary\.json: ", id="modules"),
        pytest.param({"environment": None}, r"summary\.json: ", id="no object"),
    ],
)
def test_broken_summary_is_named(make_run, changes, message):
    with pytest.raises(RunError, match=message):
        read_run(make_run(epochs=6, summary=changes))


def test_a_setting_that_is_missing_is_named(make_run):
    run = make_run()
    config = json.loads((run / "config.json").read_text())
    del config["optim"]["batch_size"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"config\.json: optim\.batch_size is missing"):
        write_report(run)


def test_samples_are_read_without_pickle(make_run):
    with pytest.raises(RunError, match=r"samples\.npz: Object arrays cannot be loaded"):
        read_run(make_run(samples={"stem": np.array([None])}))


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json", "samples.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"[]", b'{"data": 1}', b"\xff\xfe", b"[" * 9999])
def test_any_file_of_other_content_is_named(make_run, name, content):
    run = make_run()
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{re.escape(name)}\b"):
        read_run(run)


def test_command_prints_the_paths(make_run, capsys):
    run = make_run()
    assert main([str(run)]) == 0
    pictures = [str(run.parent / "plots" / f"{run.name}_bigru_{name}.png") for name in PLOTS]
    assert capsys.readouterr().out.splitlines() == [str(run.parent / "results_bigru.md"), *pictures]


@pytest.mark.parametrize("missing", ["summary.json", "config.json", "metrics.jsonl", None])
def test_command_refuses_in_one_line(make_run, capsys, missing):
    run = make_run()
    if missing:
        (run / missing).unlink()
    assert main([str(run if missing else run / "nowhere")]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("bigru.report: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["summary.json", "samples.npz"])
def test_unfinished_run_says_how_to_resume(make_run, name):
    run = make_run()
    (run / name).unlink()
    with pytest.raises(RunError, match=rf"no {name}: .*python -m bigru\.train --resume {re.escape(str(run))}"):
        write_report(run)
    assert not (run.parent / "results_bigru.md").exists()
