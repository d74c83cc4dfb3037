"""Runs side by side: the table, what makes it unfair, the picture, and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from report.documents import tables

from bigru.report import comparison, comparison_figures, document, figures
from bigru.report.compare import main
from bigru.report.record import NETWORK, read_run


@pytest.fixture
def runs(make_run):
    better = {"mpjpe": 0.5, "ade": 0.0361, "fde": 0.05, "joint_error": 0.09, "joint_error_px": 63.0, "windows": 123}
    fed = {"hands": True, "gaze": True, "objects": False, "surrogate": False}
    return [
        make_run("20261123_224500", epochs=9),
        make_run(
            "20261124_101112",
            epochs=6,
            config={"data": {"gaze": True}, "model": {"hidden_size": 64}},
            summary={"test": better, "modalities": fed},
        ),
    ]


def records(runs):
    return [read_run(run) for run in runs]


def test_the_table(runs):
    text = comparison.comparison(records(runs), "picture.png")
    assert "2 runs; their lowest figure of each error in bold." in text
    assert "![Comparison of runs](picture.png)" in text
    assert "same test windows" not in text
    assert [", ".join(row) for row in tables(text)[0]] == [
        "run, inputs, settings that differ, best epoch, test windows, MPJPE (published), ADE, FDE, per-joint error, "
        "per-joint error (px), s per epoch",
        "`20261123_224500`, hands, `hidden_size=128`, 6 of 9, 123, 0.912, **0.036**, **0.042**, 0.101, 70.4, 1.23",
        "`20261124_101112`, hands + gaze, `hidden_size=64`, 4 of 6, 123, **0.500**, **0.036**, 0.050, **0.090**, "
        "**63.0**, 1.23",
        "repeat last frame, , , , 123, 1.234, 0.040, 0.061, 0.141, 98.4, ",
        "constant velocity, , , , 123, 2.346, 0.035, 0.102, 0.241, 168.4, ",
    ]


def test_settings_that_do_not_differ_have_no_column(make_run):
    # An older run lacks a setting that came later.
    later = {"data": {"resample": None}, "run": {"out": "x"}}
    pair = [make_run("20261123_224500"), make_run("20261124_101112", config=later)]
    assert "settings that differ" not in comparison.comparison(records(pair), "picture.png")


def test_nan_is_never_the_lowest(runs):
    first, second = records(runs)
    broken = replace(first, test=replace(first.test, mpjpe=math.nan))
    text = comparison.comparison([broken, second], "picture.png")
    assert "| nan |" in text.replace("  ", "")
    assert "**nan**" not in text


@pytest.mark.parametrize("change", [{"mpjpe": 1.3}, {"windows": 122}, {"joint_error_px": math.nan}])
def test_other_test_windows_are_said_and_baselines_left_out(runs, change):
    first, second = records(runs)
    still = "repeat last frame"
    other = replace(second, baselines=second.baselines | {still: replace(second.baselines[still], **change)})
    text = comparison.comparison([first, other], "picture.png")
    assert "**These runs were not all scored on the same test windows, in the same coordinates:**" in text
    assert "in bold" not in text
    assert len(tables(text)[0]) == 3
    (_, frames) = comparison_figures.comparison([first, other]).axes
    assert len(frames.lines) == 2


def test_runs_of_one_name(runs, tmp_path):
    first, second = records(runs)
    elsewhere = replace(first, folder=tmp_path / "other" / first.stamp)
    assert comparison.names([first, elsewhere, second]) == [
        "runs/20261123_224500",
        "other/20261123_224500",
        "20261124_101112",
    ]


def test_the_picture_draws_every_run_and_the_baselines(runs):
    pair = records(runs)
    figure = comparison_figures.comparison(pair)
    epochs, frames = figure.axes
    for line, record in zip(epochs.lines, pair, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), record.metrics["va_joint_error_px"])
    expected = [*(record.horizon[NETWORK] for record in pair), *list(pair[0].horizon.values())[1:]]
    for line, errors in zip(frames.lines, expected, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), errors)
    assert [text.get_text().split("   ") for text in figure.legends[0].get_texts()] == [
        ["20261123_224500", "hands", "hidden_size=128"],
        ["20261124_101112", "hands + gaze", "hidden_size=64"],
        ["repeat last frame"],
        ["constant velocity"],
    ]
    assert figures.png(figure).startswith(b"\x89PNG")


def test_of_very_many_runs_the_best_are_drawn(runs):
    record = records(runs)[0]
    many = [replace(record, stamp=f"run_{i}", test=replace(record.test, joint_error_px=100.0 - i)) for i in range(30)]
    figure = comparison_figures.comparison(many)
    assert len(figure.axes[0].lines) == comparison_figures.MOST
    assert figure.legends[0].get_texts()[0].get_text().startswith(f"run_{30 - comparison_figures.MOST} ")
    looks = {(line.get_color(), str(line.get_linestyle())) for line in figure.axes[0].lines}
    assert len(looks) == comparison_figures.MOST


def test_runs_of_a_folder(runs):
    folder = runs[0].parent
    (folder / "20261125_000000").mkdir()
    (folder / "20261125_000000" / "config.json").write_text("{}")
    broken = folder / "20261126_000000"
    broken.mkdir()
    for name in ("config.json", "metrics.jsonl", "summary.json", "samples.npz"):
        (broken / name).write_bytes((runs[0] / name).read_bytes())
    (broken / "summary.json").write_text("{")
    (folder / "notes").mkdir()
    found, left_out = comparison.runs_in(folder)
    assert [record.folder for record in found] == runs
    assert left_out["20261125_000000"] == "not finished"
    assert left_out["20261126_000000"].startswith("summary.json: not valid JSON")
    text = document.text(found, left_out, folder)
    assert "\n\nLeft out: 20261125_000000 (not finished), 20261126_000000 (summary.json: not valid JSON" in text


def test_the_command(runs, tmp_path, capsys):
    assert main([*map(str, reversed(runs)), "--out", str(tmp_path / "new")]) == 0
    written = (tmp_path / "new" / "comparison.md").read_text()
    printed = capsys.readouterr().out
    assert printed == written.removeprefix("# Comparison of runs\n\n") + f"\n{tmp_path / 'new' / 'comparison.md'}\n"
    assert [row[0] for row in tables(written)[0]][1:3] == ["`20261124_101112`", "`20261123_224500`"]
    assert (tmp_path / "new" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main([*map(str, runs)]) == 0
    assert (runs[0].parent / "comparison.md").is_file()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [([0], "runs: expected two or more folders, got 1"), ([0, 0], "runs: expected each run once")],
)
def test_the_command_refuses(runs, capsys, chosen, message):
    assert main([str(runs[i]) for i in chosen]) == 2
    assert f"bigru.compare: {message}" in capsys.readouterr().err


def test_the_command_names_the_run_that_is_not_finished(runs, capsys):
    (runs[1] / "summary.json").unlink()
    assert main([*map(str, runs)]) == 2
    assert f"--resume {runs[1]}" in capsys.readouterr().err
    assert not (runs[0].parent / "comparison.md").exists()


def test_configurations_are_read_as_json(runs):
    # Lists and numbers of either kind differ by what they say, not by which object they are.
    options = json.loads((runs[0] / "config.json").read_text())
    assert comparison.differing_settings([replace(record, config=options) for record in records(runs)]) == ["", ""]
