"""`python -m bigru.data check` and `describe`: what they count, what they list, and how they exit."""

import contextlib
import io
import os

import h5py
import numpy as np
import pytest
from data.dataset import clip_arrays, config_for, stem_of, write_dataset

from bigru.command import run
from bigru.config import DataConfig
from bigru.data.__main__ import main
from bigru.data.check import survey
from bigru.data.clips import read_clip
from bigru.data.hdf5 import ClipError
from bigru.data.synthetic import write_clip
from bigru.data.windows import NoWindowsError, load_dataset
from bigru.report.clip import draw_clip

SMALL = ("--observed", "4", "--predicted", "4", "--stride", "3")


@pytest.fixture
def root(tmp_path):
    """Two clips of train, one older; two of val, one short; one of test at 30 frames per second, and one missing."""
    old = clip_arrays(9, seed=2)
    del old["rec_bboxes"], old["surrogate_hands"]
    old["bboxes"] = np.zeros((9, 36, 4), np.float32)
    old["left_landmarks"][:3] = 0
    clips = {
        stem_of(1): clip_arrays(11),
        stem_of(2): old,
        stem_of(49): clip_arrays(8),
        stem_of(50): clip_arrays(7),
        stem_of(60).replace("BHO", "THP"): clip_arrays(20) | {"timestamps": np.arange(20) / 29.97},
        stem_of(61): None,
    }
    clips[stem_of(49)]["right_landmarks"][:] = 0
    clips[stem_of(49)]["norm_gaze"][2:] = 0
    write_dataset(tmp_path / "clips", clips)
    return tmp_path / "clips"


def table_of(text):
    """{row: its three columns} of the table at the end; a row's further lines go on with it."""
    rows = {}
    for line in text[text.index("------") :].splitlines()[1:]:
        name, *cells = line[:26].strip(), *line[26:].split("  ")
        rows[name] = [cell.strip() for cell in cells if cell.strip()]
    return rows


def test_check_counts_what_training_will_use_lists_what_it_skips_and_leaves_no_file(root, capsys):
    before = sorted(root.rglob("*"))
    assert main(["check", str(root), *SMALL]) == 0
    assert sorted(root.rglob("*")) == before
    text = capsys.readouterr().out
    table, lines = table_of(text), text.splitlines()
    dataset = load_dataset(config_for(root))
    splits = ("train", "val", "test")
    assert table["clips"] == [str(dataset.clips[split]) for split in splits] == ["2", "1", "1"]
    assert table["windows"] == [str(len(getattr(dataset, split))) for split in splits] == ["3", "1", "5"]
    assert table["participants"] == ["2", "1", "1"]
    assert table["frames"] == ["20", "8", "20"]
    assert table["clips at frames per second"] == ["2 at 23 (assumed)", "1 at 59 (assumed)", "1 at 30"]
    # 3 of 20 frames, all 8, none; 6 of 8.
    assert table["left hand missing"] == ["15.0 %", "0.0 %", "0.0 %"]
    assert table["right hand missing"] == ["0.0 %", "100.0 %", "0.0 %"]
    assert table["gaze missing"] == ["0.0 %", "75.0 %", "0.0 %"]
    assert table["clips without gaze"] == ["0", "0", "0"]
    assert table["clips without objects"] == table["clips without surrogate"] == ["1", "0", "0"]
    assert f"{stem_of(50)}: short: 7 frames, 8 needed" in lines
    assert any(line.startswith(f"{stem_of(61)}: missing: no .h5 file in ") for line in lines)
    assert f"6 clips listed in {root / 'subtasks_byTask_time.csv'}, read from {root}" in lines
    assert "skipped: 1 short, 1 missing" in lines
    assert "frame rates assumed, as documented for the participant: 3 no timestamps" in lines


def test_check_names_all_that_an_older_clip_lacks_where_it_is_asked_for(root, capsys):
    main(["check", str(root), *SMALL, "--objects", "--surrogate"])
    text = capsys.readouterr().out
    assert f"{stem_of(2)}: missing dataset: rec_bboxes, surrogate_hands (the older layout, bboxes only)\n" in text
    assert table_of(text)["clips"] == ["1", "1", "1"]


@pytest.mark.parametrize(("strict", "bad", "code"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)], ids=str)
def test_strict_decides_the_exit_code(tmp_path, capsys, strict, bad, code):
    write_dataset(tmp_path, {stem_of(p): clip_arrays(8 - bad, seed=p) for p in (1, 49, 60)})
    assert main(["check", str(tmp_path), *SMALL, *["--strict"] * strict]) == code
    assert ("skipped: 3 short" if bad else "skipped: none") in capsys.readouterr().out


def test_check_of_a_folder_too_high_shows_a_few_and_says_where_the_clips_lie(tmp_path, capsys):
    clips = {stem_of(p): clip_arrays(8, seed=p) for p in range(1, 10)}
    write_dataset(tmp_path / "clips", clips)
    (tmp_path / "clips" / "subtasks_byTask_time.csv").rename(tmp_path / "subtasks_byTask_time.csv")
    out = tmp_path / "list.tsv"
    assert main(["check", str(tmp_path), *SMALL, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(": missing: " in line for line in lines) == 5
    assert "and 4 more: missing" in lines
    assert f"clips lie in clips/: give {tmp_path / 'clips'} instead" in lines
    assert lines[-1] == f"all clips with a fault: {out}"
    header, *rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert header == ["stem", "reason", "detail"]
    assert [(stem, reason) for stem, reason, _ in rows] == [(stem, "missing") for stem in clips]
    with pytest.raises(NoWindowsError, match=r"clips lie in clips/: give .*clips instead"):
        load_dataset(config_for(tmp_path))
    assert list(tmp_path.glob("*.cache")) == []


def test_content_in_two_splits_is_named(tmp_path, capsys):
    """A copy under another participant's name; clips without hands are alike without being copies."""
    copied, empty = clip_arrays(8, seed=1), clip_arrays(8, seed=2)
    for name in ("left_landmarks", "right_landmarks"):
        empty[name][:] = 0
    stems = [stem_of(1), stem_of(2), stem_of(49), stem_of(60), stem_of(61)]
    write_dataset(tmp_path, dict(zip(stems, (copied, empty, empty, copied, copied), strict=True)))
    assert main(["check", str(tmp_path), *SMALL, "--strict"]) == 1
    lines = capsys.readouterr().out.splitlines()
    for stem in (stem_of(60), stem_of(61)):
        assert f"{stem}: in two splits: in test, its hands are those of {stem_of(1)} in train" in lines
    assert "skipped: none" in lines
    assert "in two splits, under two names: 2" in lines
    for _ in ("read", "mapped"):
        warnings = load_dataset(config_for(tmp_path)).warnings
        assert any(warning.startswith("2 clips lie in two splits, under two names; the first") for warning in warnings)
        assert "no hand is seen in any frame of val" in warnings


def test_check_of_a_time_split_counts_a_clip_in_each_part(tmp_path):
    write_dataset(tmp_path, {stem_of(1): clip_arrays(30)})
    splits = survey(config_for(tmp_path, split="time")).splits
    assert [(tally.clips, tally.frames) for tally in splits.values()] == [(1, 14), (1, 8), (1, 8)]


def test_broken_gaze_is_no_fault_where_gaze_is_off(tmp_path):
    arrays = clip_arrays(8)
    arrays["norm_gaze"][3] = np.nan
    write_dataset(tmp_path, {stem_of(1): arrays})
    found = survey(config_for(tmp_path))
    assert (found.splits["train"].clips, found.splits["train"].gaze_frames, found.skipped) == (1, 0, [])
    assert table_of(found.text())["gaze missing"] == ["-"] * 3
    assert [skip.reason for skip in survey(config_for(tmp_path, gaze=True)).skipped] == ["non-finite"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere"], "data_root: the folder of clips nowhere does not exist"),
        (["check", "file"], "data_root: the folder of clips file is not a folder"),
        (["check", "."], "no index of clips: looked for "),
        (["check", ".", "--observed", "3"], "predicted: expected 3"),
        (["describe", "nowhere.h5"], "nowhere.h5: missing: no such file"),
        (["describe", "file"], "file: unreadable: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    try:
        code = main(arguments)
    except SystemExit as stopped:
        # Settings that contradict each other are found while the command line is read.
        code = stopped.code
    assert code == 2
    captured = capsys.readouterr()
    assert words in " ".join((captured.out + captured.err).split())


def test_describe_one_clip(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["describe", str(root / "BHO" / f"{stem_of(2)}.h5"), "--observed", "2", "--stride", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        f"{stem_of(2)}\n9 frames at 23 per second (assumed: no timestamps), 0.35 s; both hands missing in 0.0 %\n"
    )
    assert "3 windows of 2 + 2 frames, one every 2\n" in text
    rows = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in text.splitlines() if "float32" in line}
    assert rows["left_landmarks"] == "9 x 21 x 3 float32 33.3 %"
    assert rows["right_landmarks"] == "9 x 21 x 3 float32 0.0 %"
    assert rows["bboxes"] == "9 x 36 x 4 float32"
    assert "lacks: rec_bboxes (for --objects), surrogate_hands (for --surrogate), timestamps\n" in text
    picture = tmp_path / f"{stem_of(2)}.png"
    assert text.endswith(f"picture: {picture.name}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_describe_takes_a_clip_too_short_for_a_window_and_says_of_none_what_training_says(root, tmp_path, capsys):
    path, out = root / "BHO" / f"{stem_of(1)}.h5", tmp_path / "mine.png"
    assert main(["describe", str(path), "--out", str(out)]) == 0
    assert "0 windows of 60 + 60 frames, one every 15 (120 frames needed)" in capsys.readouterr().out
    assert out.is_file()
    write_clip(path, clip_arrays(0))
    assert main(["describe", str(path)]) == 1
    assert "cannot be used: short: 0 frames, 120 needed" in capsys.readouterr().out
    with pytest.raises(ClipError, match=r"^short: 0 frames, 120 needed"):
        read_clip(path, DataConfig())


def test_describe_tells_of_holes_and_reads_nan_where_asked_to(tmp_path, capsys):
    """Of a clip with a name of its own."""
    path = tmp_path / "mine.h5"
    seconds = np.arange(12) / 23 + np.where(np.arange(12) > 6, 30, 0)
    arrays = clip_arrays(12) | {"timestamps": seconds}
    arrays["left_landmarks"][:3] = np.nan
    write_clip(path, arrays)
    assert main(["describe", str(path)]) == 1
    assert "zeros mean missing, and with --nan-missing NaN does too" in capsys.readouterr().out
    assert main(["describe", str(path), "--nan-missing", "--out", str(tmp_path / "x.png")]) == 0
    text = capsys.readouterr().out
    assert "12 frames at 23 per second, 30.48 s;" in text
    assert "1 of its steps in time longer than 0.2 s, the longest 30.04 s; after --resample the hands" in text
    assert " ".join(next(line for line in text.splitlines() if "left" in line).split()).endswith("float32 25.0 %")


def test_terminal_without_the_letters_of_a_path(tmp_path):
    root = tmp_path / os.fsdecode(b"d\xe4ta") / "ü"
    write_dataset(root, {stem_of(1): clip_arrays(8)})
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as terminal:
        assert run("data", ["check", str(root), *SMALL]) == 0
        terminal.flush()
    assert b"d\\xe4ta/\\xfc\n" in terminal.buffer.getvalue()


def test_describe_says_what_is_wrong_with_each_dataset_and_draws_nothing(tmp_path, capsys):
    arrays = clip_arrays(8)
    arrays["left_landmarks"][5] = np.nan
    arrays["norm_gaze"] = np.zeros((8, 3), np.float32)
    path = tmp_path / f"{stem_of(1)}.h5"
    write_clip(path, arrays)
    with h5py.File(path, "a") as file:
        file["elsewhere"] = h5py.ExternalLink("/etc/passwd", "x")
        file["\x1b[31mred"] = np.zeros(3)
        file.create_group("group")
    assert main(["describe", str(path), "--out", str(tmp_path / "x.png")]) == 1
    text = capsys.readouterr().out
    assert "cannot be used: non-finite: left_landmarks in frame 5" in text
    for words in ("wrong shape: norm_gaze is (8, 3)", "linked: elsewhere is a", "no dataset"):
        assert words in text
    assert text.count("non-finite: left_landmarks in frame 5") == 2
    assert "\x1b" not in text
    assert not (tmp_path / "x.png").exists()


def test_picture_shows_the_wrists_in_pixels_and_nothing_where_a_hand_is_missing():
    hands = np.random.default_rng(0).uniform(0.1, 0.9, (12, 2, 21, 3)).astype(np.float32)
    hands[3:6, 0] = 0
    present = hands.any(axis=(2, 3))
    figure = draw_clip("name", 23.0, np.arange(12) / 23, hands, present)
    drawn = {axes.get_ylabel(): [line.get_ydata() for line in axes.lines] for axes in figure.axes}
    for axis, label, size in ((0, "wrist x (px)", 1728), (1, "wrist y (px)", 972)):
        for hand in (0, 1):
            expected = np.where(present[:, hand], hands[:, hand, 0, axis] * size, np.nan)
            np.testing.assert_allclose(drawn[label][hand], expected, rtol=1e-6)
    presence = figure.axes[-1]
    assert [label.get_text() for label in presence.get_yticklabels()] == ["left 75 %", "right 100 %"]
    assert "time (s)" in presence.get_xlabel()
    assert figure.get_facecolor() == (1, 1, 1, 1)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("seen", [False, True])
def test_picture_of_next_to_nothing(frames, seen):
    hands = np.full((frames, 2, 21, 3), 0.5 if seen else 0.0, np.float32)
    figure = draw_clip("x" * 200, 59.0, np.arange(frames) / 59, hands, np.full((frames, 2), seen))
    figure.canvas.draw()


def test_progress_is_shown_when_asked_for(root, capsys):
    survey(config_for(root), progress=True)
    assert "checking" in capsys.readouterr().err
    survey(config_for(root))
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_place_of_a_clip_does_not_block(root):
    os.mkfifo(root / "BHO" / f"{stem_of(61)}.h5")
    reasons = {skip.stem: skip.reason for skip in survey(config_for(root)).skipped}
    assert reasons[stem_of(61)] == "missing"
