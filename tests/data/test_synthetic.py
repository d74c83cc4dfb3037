"""The generator: the layout and the statistics of the real clips, the same arrays from the same seed."""

import json

import h5py
import numpy as np
import pytest

from bigru.config import DataConfig
from bigru.data import synthetic
from bigru.data.index import CLIP_NAME, INDEX_NAME, SUBTASKS, read_index
from bigru.data.windows import load_dataset

SHAPES = {
    "left_landmarks": (21, 3),
    "right_landmarks": (21, 3),
    "timestamps": (),
    "norm_gaze": (2,),
    "rec_bboxes": (30, 4),
    "surrogate_hands": (2, 4),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return synthetic.write_synthetic(tmp_path_factory.mktemp("synthetic") / "clips", 12, 3)


def read_all(root):
    """Return {file relative to root: {dataset: bytes}}."""
    content = {}
    for path in sorted(root.rglob("*.h5")):
        with h5py.File(path) as file:
            content[str(path.relative_to(root))] = {name: file[name][:].tobytes() for name in file}
    return content


def moving_hands(plan):
    """Draw a clip and return both hands' landmarks, (F, 42, 2), if they are seen throughout."""
    arrays = synthetic.clip_arrays(plan, 0)
    joints = np.concatenate([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)
    return joints[..., :2].astype(np.float64) if joints.any(axis=2).all() else None


def test_layout_and_index_are_the_published_ones(written):
    index = read_index(written / INDEX_NAME)
    assert len(index.clips) == 12
    assert not index.skipped
    assert {path.name for path in written.iterdir() if path.is_file()} == {INDEX_NAME, synthetic.MARKER_NAME}
    assert len(list(written.rglob("*.h5"))) == 12
    for clip in index.clips:
        assert CLIP_NAME.fullmatch(f"{clip.stem}.mp4")
        assert clip.subtask in SUBTASKS
        with h5py.File(written / clip.subtask / f"{clip.stem}.h5") as file:
            frames = len(file["timestamps"])
            assert {name: file[name].shape for name in file} == {n: (frames, *s) for n, s in SHAPES.items()}
            assert {file[name].dtype for name in file} == {np.dtype(np.float32)}
            assert not file.attrs
            assert all(np.isfinite(file[name][:]).all() for name in file)
    header, first, *_ = (written / INDEX_NAME).read_text().splitlines()
    assert header == "participant\tcamera\ttask\tsubtask\tstart_time\tend_time\tfilename"
    fields = first.split("\t")
    assert fields[6] == "-".join([*fields[:4], "_".join(fields[4:6])]) + ".mp4"
    assert len(fields[4]) > 10


@pytest.mark.parametrize("clips", [3, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_even_small_datasets_have_windows_in_every_split(tmp_path, clips, seed):
    root = synthetic.write_synthetic(tmp_path / "clips", clips, seed)
    dataset = load_dataset(DataConfig(data_root=root, gaze=True, objects=True, surrogate=True))
    assert min(len(dataset.train), len(dataset.val), len(dataset.test)) >= 3
    assert set(dataset.skip_counts()) <= {"short"}


def test_embedded_dataset_has_the_intended_size():
    config = DataConfig()
    plans = synthetic.plan_clips(**synthetic.EMBEDDED)
    counts = dict.fromkeys(("train", "val", "test"), 0)
    rates = set()
    for plan in plans:
        split = "train" if plan.participant < 49 else "val" if plan.participant < 60 else "test"
        windows = max(0, (plan.frames - config.observed - config.predicted) // config.stride + 1)
        counts[split] += windows
        if windows and split == "train":
            rates.add(plan.fps)
    assert len(plans) < 500
    assert 350 <= counts["train"] <= 450
    assert 90 <= counts["val"] <= 120
    assert 90 <= counts["test"] <= 120
    assert rates == {23.0, 59.0}


@pytest.mark.parametrize("seed", [0, 1])
def test_lengths_follow_the_published_quantiles(seed):
    frames = np.array([plan.frames for plan in synthetic.plan_clips(2000, seed)])
    np.testing.assert_allclose(np.quantile(frames, [0.5, 0.75, 0.95]), [82, 124, 232], rtol=0.06)
    assert frames.min() >= 2
    assert frames.max() <= 1591


def test_participants_and_frame_rates():
    plans = synthetic.plan_clips(300, 0)
    assert {plan.participant for plan in plans} == set(synthetic.PARTICIPANTS)
    assert 16 not in synthetic.PARTICIPANTS
    assert all(plan.fps == (23 if plan.participant <= 28 else 59) for plan in plans)
    assert {plan.fps for plan in synthetic.plan_clips(12, 0)} == {23.0, 59.0}
    assert len({plan.stem for plan in plans}) == 300


def test_hands_go_missing_in_runs_and_sometimes_throughout():
    plans = [plan for plan in synthetic.plan_clips(200, 0) if plan.frames >= 40]
    fractions, runs = [], []
    for plan in plans:
        seen = synthetic.clip_arrays(plan, 0)["right_landmarks"].any(axis=(1, 2))
        fractions.append(1 - seen.mean())
        if 0 < fractions[-1] < 1:
            runs.append(np.count_nonzero(np.diff(seen.astype(int)) == -1) + (not seen[0]))
    fractions = np.array(fractions)
    assert 0.8 < (fractions == 0).mean() < 0.98
    assert (fractions == 1).any()
    # Runs, not scattered frames: at most three of them however many frames are missing.
    assert max(runs) <= 3
    partial = fractions[(fractions > 0) & (fractions < 1)]
    assert partial.max() > 0.2


def test_gaze_and_boxes_are_coded_as_published():
    gaze_missing, object_counts, surrogate_absent = [], set(), []
    for plan in synthetic.plan_clips(120, 0):
        arrays = synthetic.clip_arrays(plan, 0)
        gaze_missing.append((arrays["norm_gaze"] == 0).all(axis=1).mean())
        used = arrays["rec_bboxes"].any(axis=(0, 2))
        object_counts.add(int(used.sum()))
        # Padding comes last.
        assert not np.diff(used.astype(int)).max(initial=0) > 0
        surrogate_absent.append(not arrays["surrogate_hands"].any(axis=(0, 2)).all())
        assert arrays["rec_bboxes"].max() < 1
    assert {0.0, 1.0} < set(gaze_missing)
    assert min(object_counts) >= 4
    assert max(object_counts) <= 12
    assert 0 < np.mean(surrogate_absent) < 0.6


def test_hands_look_like_hands_that_move_smoothly_by_the_frame_rate():
    """Fingers are chains: neighbours within a hand's length, fingertips on the far side of the wrist."""
    for plan in synthetic.plan_clips(30, 0):
        seconds = synthetic.clip_arrays(plan, 0)["timestamps"]
        np.testing.assert_allclose(seconds, np.arange(plan.frames) / plan.fps, rtol=1e-6)
        joints = moving_hands(plan)
        if joints is None:
            continue
        assert joints.min() > -0.1
        assert joints.max() < 1.1
        for hand in (joints[:, :21], joints[:, 21:]):
            spans = np.linalg.norm(np.diff(hand[:, 1:].reshape(-1, 5, 4, 2), axis=2), axis=-1)
            assert spans.max() < 0.06
            assert np.linalg.norm(hand - hand[:, :1], axis=-1).max() < 0.25
        # Seen from above and in front, a person's left hand is on the image's right.
        assert joints[:, 0, 0].mean() > joints[:, 21, 0].mean()
        if plan.frames >= 120:
            # The motion lies in the hands' relative position; a frame's step is a small part of the way.
            between = joints[:, 0] - joints[:, 21]
            assert np.ptp(between, axis=0).max() > 0.1
            assert np.abs(np.diff(between, axis=0)).max() < 0.25 * np.ptp(between, axis=0).max()


def test_motion_can_be_forecast_where_last_frame_and_velocity_fail():
    """A sinusoid with its harmonic, fitted to 60 observed frames, must forecast the wrists' distance far better."""
    last_error, velocity_error, fit_error = [], [], []
    for plan in synthetic.plan_clips(60, 0):
        joints = moving_hands(plan)
        if joints is None or plan.frames < 120:
            continue
        track = joints[:120, 0, 1] - joints[:120, 21, 1]
        seconds = np.arange(120) / plan.fps
        fits = []
        for period in np.linspace(1.3, 1.7, 21):
            angles = 2 * np.pi * seconds[:, None] / period * [1, 2]
            basis = np.concatenate([np.ones((120, 1)), np.sin(angles), np.cos(angles)], axis=1)
            weights = np.linalg.lstsq(basis[:60], track[:60], rcond=None)[0]
            fits.append((np.square(basis[:60] @ weights - track[:60]).sum(), basis[60:] @ weights))
        forecast = min(fits, key=lambda fit: fit[0])[1]
        future, ahead = track[60:], np.arange(1, 61)
        fit_error.append(np.abs(forecast - future).mean())
        last_error.append(np.abs(track[59] - future).mean())
        velocity_error.append(np.abs(track[59] + ahead * (track[59] - track[54]) / 5 - future).mean())
    assert len(fit_error) >= 8
    assert np.mean(fit_error) < 0.4 * np.mean(last_error)
    assert np.mean(fit_error) < 0.4 * np.mean(velocity_error)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, written):
    again = synthetic.write_synthetic(tmp_path / "again", 12, 3)
    assert read_all(again) == read_all(written)
    assert (again / INDEX_NAME).read_bytes() == (written / INDEX_NAME).read_bytes()
    other = synthetic.write_synthetic(tmp_path / "other", 12, 4)
    assert not set(read_all(other)) & set(read_all(written))


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_with_other_files_is_left_alone(tmp_path, overwrite):
    clip = tmp_path / "BHO" / "p01-CAM_AV-BIAH_RB-BHO-0_1.h5"
    synthetic.write_clip(clip, {"left_landmarks": np.zeros((2, 21, 3), np.float32)})
    before = clip.read_bytes()
    with pytest.raises(FileExistsError, match="not generated here"):
        synthetic.write_synthetic(tmp_path, 3, 0, overwrite=overwrite)
    with pytest.raises(FileExistsError, match="not generated here"):
        synthetic.ensure_synthetic(tmp_path, 3, 0)
    assert clip.read_bytes() == before
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize("rewriting", [False, True])
def test_interrupted_write_leaves_no_index_and_is_taken_up_again(tmp_path, monkeypatch, rewriting):
    root = tmp_path / "clips"
    if rewriting:
        synthetic.write_synthetic(root, 3, 1)
    drawn, draw = [], synthetic.clip_arrays

    def stop_at_third(plan, seed):
        drawn.append(plan)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(plan, seed)

    monkeypatch.setattr(synthetic, "clip_arrays", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_synthetic(root, 4, 0, overwrite=True)
    assert not (root / INDEX_NAME).exists()
    assert len(read_all(root)) == 2
    synthetic.ensure_synthetic(root, 4, 0)
    assert len(read_all(root)) == len(read_index(root / INDEX_NAME).clips) == 4


def test_failed_clip_leaves_nothing_behind(tmp_path):
    path = tmp_path / "clip.h5"
    synthetic.write_clip(path, {"a": np.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        synthetic.write_clip(path, {"a": np.ones(3), "b": object()})
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_ensure_reuses_the_same_and_rebuilds_another(tmp_path):
    root = tmp_path / "cache" / "clips"
    assert synthetic.ensure_synthetic(root, 4, 0) == root
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    synthetic.ensure_synthetic(root, 4, 0)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == stamps
    first = read_all(root)
    synthetic.ensure_synthetic(root, 4, 1)
    assert not set(read_all(root)) & set(first)
    synthetic.ensure_synthetic(root, 3, 1)
    assert len(read_all(root)) == 3


@pytest.mark.parametrize("damage", ["version", "garbage", "index"])
def test_ensure_rebuilds_what_it_cannot_trust(tmp_path, damage):
    root = synthetic.ensure_synthetic(tmp_path / "clips", 3, 0)
    before = read_all(root)
    marker = root / synthetic.MARKER_NAME
    match damage:
        case "version":
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": synthetic.FORMAT - 1}))
        case "garbage":
            marker.write_bytes(b"\xff{")
        case "index":
            (root / INDEX_NAME).unlink()
    next(root.rglob("*.h5")).write_bytes(b"stale")
    synthetic.ensure_synthetic(root, 3, 0)
    assert read_all(root) == before


@pytest.mark.parametrize(
    ("arguments", "words"), [({"clips": 2}, "clips: expected at least 3"), ({"seed": -1}, "seed: expected 0 or more")]
)
def test_bad_arguments(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        synthetic.write_synthetic(tmp_path / "clips", **{"clips": 4, "seed": 0} | arguments)
    assert not (tmp_path / "clips").exists()


def test_the_command_does_not_write_over_a_complete_dataset_unless_asked(tmp_path, capsys):
    root = tmp_path / "clips"
    synthetic.main([str(root), "--clips", "4", "--seed", "1"])
    assert capsys.readouterr().out.startswith("4 clips of 4 participants, ")
    before = read_all(root)
    assert len(before) == 4
    assert synthetic.main([str(root), "--clips", "3", "--seed", "2"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert read_all(root) == before
    synthetic.main([str(root), "--clips", "3", "--seed", "2", "--overwrite"])
    assert len(read_all(root)) == 3
    assert not set(read_all(root)) & set(before)
