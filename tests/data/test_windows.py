"""Windows: features, centring, masks, counts, splits, batches, and what happens to clips that cannot be used."""

import dataclasses

import numpy as np
import pytest
import torch
from data.dataset import CONFIG, clip_arrays, config_for, stem_of, write_dataset

from bigru.config import DataConfig
from bigru.data.clips import Clip
from bigru.data.frames import frame_features, split_frames, window_count
from bigru.data.index import SUBTASKS
from bigru.data.windows import load_dataset
from bigru.model.metrics import repeat_last_frame, score, summarise

ALL = {"gaze": True, "objects": True, "surrogate": True}


def expected_hands(arrays):
    """(F, 84): the published centring, written out joint by joint in float64."""
    left, right = (arrays[name].astype(np.float64) for name in ("left_landmarks", "right_landmarks"))
    features = np.zeros((len(left), 84))
    for frame in range(len(left)):
        middle_x = (left[frame, 0, 0] + right[frame, 0, 0]) / 2
        middle_y = (left[frame, 0, 1] + right[frame, 0, 1]) / 2
        for joint in range(21):
            for hand, values in enumerate((left, right)):
                features[frame, 42 * hand + 2 * joint] = (values[frame, joint, 0] - middle_x) / 0.5
                features[frame, 42 * hand + 2 * joint + 1] = (values[frame, joint, 1] - middle_y) / 0.5
    return features


def test_feature_order_and_centring():
    frames = 3
    hands = np.zeros((frames, 2, 21, 3), np.float32)
    hands[:, :, :, 0] = 100 * np.arange(1, 3)[:, None] + np.arange(21)
    hands[:, :, :, 1] = 1000 + 100 * np.arange(1, 3)[:, None] + 2 * np.arange(21)
    hands[:, :, :, 2] = -1e6
    gaze = np.array([[1, 2]] * frames, np.float32)
    objects = np.tile(np.arange(120, dtype=np.float32).reshape(30, 4) + 10_000, (frames, 1, 1))
    surrogate = np.tile(np.arange(8, dtype=np.float32).reshape(2, 4) + 20_000, (frames, 1, 1))
    features = frame_features(Clip(23.0, hands, gaze, objects, surrogate, np.arange(frames) / 23))
    assert features.dtype == np.float32
    # Wrists at (100, 1100) and (200, 1200): the origin is (150, 1150).
    left = np.stack([np.arange(21) - 50, 2 * np.arange(21) - 50], axis=1) / 0.5
    right = np.stack([np.arange(21) + 50, 2 * np.arange(21) + 50], axis=1) / 0.5
    expected = [left.ravel(), right.ravel(), [1, 2], np.arange(120) + 10_000, np.arange(8) + 20_000]
    np.testing.assert_array_equal(features, np.tile(np.concatenate(expected), (frames, 1)))


@pytest.mark.parametrize("modalities", [{}, {"gaze": True}, {"objects": True}, {"surrogate": True}, ALL], ids=str)
def test_modalities_are_in_the_input_and_leave_the_target_alone(three_clips, modalities):
    root, clips = three_clips
    config = config_for(root, **modalities)
    batch = load_dataset(config).test.batch(torch.tensor([1]))
    arrays = clips[stem_of(60)]
    names = {"gaze": "norm_gaze", "objects": "rec_bboxes", "surrogate": "surrogate_hands"}
    others = [arrays[name].reshape(20, -1) for key, name in names.items() if modalities.get(key)]
    features = np.concatenate([expected_hands(arrays), *others], axis=1)
    assert batch.x.shape == (1, 4, config.input_size)
    np.testing.assert_allclose(batch.x[0], features[3:7], atol=1e-6)
    np.testing.assert_allclose(batch.target[0], features[7:11, :84], atol=1e-6)


def test_missing_hand_is_masked_and_its_zeros_move_the_origin_as_published(tmp_path):
    clips = {stem_of(p): clip_arrays(8, seed=p) for p in (1, 50, 61)}
    arrays = clips[stem_of(1)]
    arrays["left_landmarks"][5] = 0
    arrays["right_landmarks"][6:] = 0
    write_dataset(tmp_path, clips)
    batch = load_dataset(config_for(tmp_path)).train.batch(torch.tensor([0]))
    expected = np.ones((4, 42), bool)
    expected[1, :21] = False
    expected[2:, 21:] = False
    assert batch.present.dtype == torch.bool
    np.testing.assert_array_equal(batch.present[0], expected)
    np.testing.assert_allclose(batch.target[0], expected_hands(arrays)[4:], atol=1e-6)


@pytest.mark.parametrize(("frames", "count"), [(2, 0), (119, 0), (120, 1), (134, 1), (135, 2), (1591, 99)])
def test_window_count_at_the_published_lengths(frames, count):
    config = DataConfig()
    assert window_count(frames, config) == count
    starts = range(0, 2000, config.stride)
    assert count == sum(start + config.observed + config.predicted <= frames for start in starts)


def test_windows_start_every_stride_and_never_cross_clips(tmp_path):
    clips = {stem_of(1, n): clip_arrays(frames, seed=n) for n, frames in enumerate((7, 8, 10, 11, 16))}
    clips |= {stem_of(p): clip_arrays(8) for p in (49, 60)}
    write_dataset(tmp_path, clips)
    train = load_dataset(config_for(tmp_path)).train
    assert train.stems == tuple(stem_of(1, n) for n in (1, 2, 3, 4))
    assert train.clip.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert train.starts.tolist() == [0, 8, 18, 21, 29, 32, 35]
    assert len(train.frames) == 8 + 10 + 11 + 16
    assert len(train) == len(train.fps) == 7


def test_split_by_participant(tmp_path):
    people = (1, 48, 49, 59, 60, 70, 71, 99)
    write_dataset(tmp_path, {stem_of(p): clip_arrays(8) for p in people})
    dataset = load_dataset(config_for(tmp_path))
    assert dataset.train.stems == (stem_of(1), stem_of(48))
    assert dataset.val.stems == (stem_of(49), stem_of(59))
    assert dataset.test.stems == (stem_of(60), stem_of(70))
    assert dataset.clips == {"train": 2, "val": 2, "test": 2}
    assert [(skip.stem, skip.reason) for skip in dataset.skipped] == [(stem_of(p), "no split") for p in (71, 99)]
    with pytest.raises(ValueError, match=r"^split: expected"):
        load_dataset(config_for(tmp_path, split="random"))


def test_fps_of_each_window(tmp_path):
    clips = {stem_of(p): clip_arrays(11) for p in (28, 29, 50, 60)}
    clips[stem_of(60)]["timestamps"] = (np.arange(11) / 30).astype(np.float32)
    write_dataset(tmp_path, clips)
    dataset = load_dataset(config_for(tmp_path))
    assert dataset.train.fps.tolist() == [23, 23, 59, 59]
    assert dataset.test.batch(torch.tensor([1, 0])).fps.tolist() == [30, 30]
    assert dataset.test.fps.dtype == torch.float32


def test_subtask_of_each_window_by_one_map_for_all_splits(tmp_path):
    names = ("BHO", "THP", "CG", "RPP", "ZZZ", "BHO")
    stems = [stem_of(p).replace("BHO", name) for p, name in zip((1, 2, 3, 4, 50, 60), names, strict=True)]
    write_dataset(tmp_path, {stem: clip_arrays(8 + 3 * n) for n, stem in enumerate(stems)})
    dataset = load_dataset(config_for(tmp_path))
    assert [SUBTASKS[n] for n in dataset.train.subtask] == ["BHO", *["THP"] * 2, *["CG"] * 3, *["RPP"] * 4]
    assert dataset.val.subtask.tolist() == [-1] * 5
    assert dataset.test.subtask.tolist() == [SUBTASKS.index("BHO")] * 6
    assert dataset.test.subtask.dtype == torch.int64
    # The published ones, in alphabetical order.
    assert len(SUBTASKS) == 36
    assert list(SUBTASKS) == sorted(set(SUBTASKS))


@pytest.mark.parametrize("frames", [8, 23, 24, 25, 40, 54, 100, 331])
def test_time_split_shares_no_frame(tmp_path, frames):
    """Every frame carries its own number as gaze; the numbers that windows hold are compared across splits."""
    clips = {stem_of(p): clip_arrays(length) for p, length in ((1, frames), (60, 30))}
    for first, arrays in zip((0, 1000), clips.values(), strict=True):
        arrays["norm_gaze"][:, 0] = first + np.arange(len(arrays["norm_gaze"]))
    write_dataset(tmp_path, clips)
    dataset = load_dataset(config_for(tmp_path, split="time", gaze=True))
    seen = {}
    for split in ("train", "val", "test"):
        windows = getattr(dataset, split)
        rows = windows.starts[:, None] + torch.arange(8)
        seen[split] = set(windows.frames[rows][..., 84].int().flatten().tolist())
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]
    ours = {split: {n for n in numbers if n < 1000} for split, numbers in seen.items()}
    if frames >= 24:
        assert max(ours["train"]) < min(ours["val"])
        assert max(ours["val"]) < min(ours["test"])
    else:
        assert ours["train"]
        assert not ours["val"] | ours["test"]


@pytest.mark.parametrize(
    ("frames", "held"), [(23, None), (24, 8), (53, 8), (60, 9), (100, 15)], ids=lambda value: str(value)
)
def test_time_split_sizes(frames, held):
    parts = split_frames(frames, 60, dataclasses.replace(CONFIG, split="time"))
    if held is None:
        assert parts == {"train": (0, frames)}
    else:
        middle = frames - 2 * held
        assert parts == {"train": (0, middle), "val": (middle, middle + held), "test": (middle + held, frames)}


def test_batch_follows_its_indices_and_may_be_written_to(three_clips):
    root, clips = three_clips
    test = load_dataset(config_for(root)).test
    before, indices = test.frames.clone(), torch.tensor([4, 0, 4, 2])
    batch = test.batch(indices)
    features = expected_hands(clips[stem_of(60)])
    for row, index in enumerate(indices.tolist()):
        np.testing.assert_allclose(batch.x[row], features[3 * index : 3 * index + 4], atol=1e-6)
        np.testing.assert_allclose(batch.target[row], features[3 * index + 4 : 3 * index + 8], atol=1e-6)
    assert batch.x.dtype == batch.target.dtype == batch.fps.dtype == torch.float32
    assert batch.present.shape == (4, 4, 42)
    for part in (batch.x, batch.target):
        assert part.is_contiguous()
        part.zero_()
    assert torch.equal(test.frames, before)


@pytest.mark.parametrize(("batch_size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (1, [1] * 5), (6, [5])])
def test_batches_cover_the_windows_once_in_order(three_clips, batch_size, sizes):
    test = load_dataset(config_for(three_clips[0])).test
    batches = list(test.batches(batch_size))
    assert [len(batch.x) for batch in batches] == sizes
    whole = test.batch(torch.arange(sum(sizes)))
    assert torch.equal(torch.cat([batch.target for batch in batches]), whole.target)


def test_batches_in_a_given_order_or_of_a_choice(three_clips):
    test = load_dataset(config_for(three_clips[0])).test
    order = torch.tensor([3, 1, 4])
    batches = list(test.batches(2, order))
    assert torch.equal(torch.cat([batch.x for batch in batches]), test.batch(order).x)
    assert list(test.batches(2, order[:0])) == []
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        next(test.batches(0))


def test_frames_are_stored_once_shared_and_moved_with_every_tensor(three_clips):
    root, _ = three_clips
    dense = load_dataset(config_for(root, stride=1)).test
    sparse = load_dataset(config_for(root, stride=12)).test
    assert (len(dense), len(sparse)) == (13, 2)
    assert dense.frames.shape == sparse.frames.shape == (20, 84)
    assert dense.to("cpu").frames.data_ptr() == dense.frames.data_ptr()
    moved = dense.to("meta")
    assert {t.device.type for t in (moved.frames, moved.present, moved.starts, moved.fps, moved.clip)} == {"meta"}
    assert (moved.stems, moved.observed, moved.predicted) == ((stem_of(60),), 4, 4)


def test_progress_bar_can_be_asked_for(three_clips, capsys):
    load_dataset(config_for(three_clips[0]), progress=True)
    assert "clips" in capsys.readouterr().err
    load_dataset(config_for(three_clips[0]), progress=False)
    assert capsys.readouterr().err == ""


def test_centred_on_the_last_observed_frame(three_clips):
    """Written out window by window in float64: one origin for all that is seen and all that follows."""
    root, clips = three_clips
    batch = load_dataset(config_for(root, centre="last", gaze=True)).test.batch(torch.tensor([3, 0]))
    arrays = {name: values.astype(np.float64) for name, values in clips[stem_of(60)].items()}
    hands = np.stack([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)[..., :2]
    for row, start in enumerate((9, 0)):
        middle = (hands[start + 3, 0, 0] + hands[start + 3, 1, 0]) / 2
        expected = ((hands[start : start + 8] - middle) / 0.5).reshape(8, 84)
        np.testing.assert_allclose(batch.x[row, :, :84], expected[:4], atol=1e-6)
        np.testing.assert_allclose(batch.target[row], expected[4:], atol=1e-6)
        np.testing.assert_array_equal(batch.x[row, :, 84:], clips[stem_of(60)]["norm_gaze"][start : start + 4])


@pytest.mark.parametrize(
    ("seen", "hands"),
    [((True, True), [0, 1]), ((True, False), [0]), ((False, True), [1]), ((False, False), [])],
    ids=str,
)
def test_origin_is_of_the_wrists_that_are_seen(tmp_path, seen, hands):
    clips = {stem_of(p): clip_arrays(8, seed=p) for p in (1, 49, 60)}
    names = ("left_landmarks", "right_landmarks")
    for name, here in zip(names, seen, strict=True):
        if not here:
            clips[stem_of(60)][name][3] = 0
    write_dataset(tmp_path, clips)
    batch = load_dataset(config_for(tmp_path, centre="last")).test.batch(torch.tensor([0]))
    arrays = clips[stem_of(60)]
    wrists = [arrays[names[hand]][3, 0, :2] for hand in hands] or [np.array([0.5, 0.5])]
    joints = np.stack([arrays[name][4:, :, :2] for name in names], axis=1)
    np.testing.assert_allclose(batch.target[0], ((joints - np.mean(wrists, axis=0)) / 0.5).reshape(4, 84), atol=1e-6)


def test_hands_that_move_as_a_whole_move_only_with_one_origin_for_the_window(tmp_path):
    """Half an image's width in 8 frames: nothing at all in the published centring, so many pixels in the other."""
    clips = {stem_of(p): clip_arrays(8, seed=p) for p in (1, 49, 60)}
    still = clips[stem_of(60)]
    for name in ("left_landmarks", "right_landmarks"):
        still[name][:] = still[name][:1]
        still[name][..., 0] += np.linspace(0, 0.5, 8, dtype=np.float32)[:, None]
    write_dataset(tmp_path, clips)
    published, whole = (load_dataset(config_for(tmp_path, centre=centre)).test for centre in ("frame", "last"))
    for windows, expected_px in ((published, 0.0), (whole, np.mean(np.arange(1, 5)) / 7 * 0.5 * 1728)):
        metrics = summarise(score(repeat_last_frame, windows.batches(1)))
        assert metrics.joint_error_px == pytest.approx(expected_px, abs=1e-3)
        assert metrics.ade == pytest.approx(expected_px / 864, abs=1e-5)
