"""Clips brought to one frame rate: between their frames in time, and never between something and nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from data.dataset import clip_arrays, config_for, stem_of, write_dataset

from bigru.config import DataConfig
from bigru.data.check import survey
from bigru.data.clips import Clip, read_clip, resampled, resampled_length
from bigru.data.hdf5 import ClipError
from bigru.data.synthetic import write_clip
from bigru.data.windows import load_dataset

FRAMES = 12
CONFIG = DataConfig(observed=2, predicted=2, gaze=True, objects=True, surrogate=True)


def clip_at(seconds, seed=0):
    """A clip whose every number is drawn."""
    arrays = clip_arrays(len(seconds), seed)
    hands = np.stack([arrays["left_landmarks"], arrays["right_landmarks"]], axis=1)
    return Clip(23.0, hands, arrays["norm_gaze"], arrays["rec_bboxes"], arrays["surrogate_hands"], np.array(seconds))


def at(clip, time):
    """The hands at a time, by np.interp of each coordinate in turn."""
    flat = clip.hands.reshape(len(clip.seconds), -1)
    return np.array([np.interp(time, clip.seconds, column) for column in flat.T]).reshape(2, 21, 3)


@pytest.mark.parametrize("rate", [10.0, 23.0, 30.0, 59.0, 7.3], ids=str)
@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param(np.arange(FRAMES) / 23, id="even"),
        pytest.param(np.cumsum([0, 1, 1, 3, 1, 1, 1, 2, 1, 1, 1, 1]) / 23, id="dropped-frames"),
        pytest.param(np.cumsum([0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]) / 23, id="repeated-times"),
    ],
)
def test_positions_lie_between_the_frames_in_time(seconds, rate):
    clip = clip_at(seconds)
    again = resampled(clip, rate)
    assert again.fps == rate
    assert len(again.hands) == int(seconds[-1] * rate + 0.01) + 1
    assert again.hands.dtype == again.gaze.dtype == again.objects.dtype == np.float32
    for number, hands in enumerate(again.hands):
        time = number / rate
        assert again.seconds[number] == time
        # Where two frames have one time, either is right, and np.interp takes one of them.
        distance = np.abs(seconds - time)
        same = np.flatnonzero(distance < 1e-9)
        if len(same) < 2:
            np.testing.assert_allclose(hands, at(clip, time), atol=0.01)
        if distance.min() > 0.02 / 23:
            np.testing.assert_allclose(hands, at(clip, time), atol=1e-6)


def test_a_clip_that_has_the_rate_passes_unchanged():
    seconds = (np.arange(FRAMES) / 59).astype(np.float32).astype(np.float64)
    clip = clip_at(seconds)
    again = resampled(clip, 59.0)
    for name in ("hands", "gaze", "objects", "surrogate"):
        np.testing.assert_array_equal(getattr(again, name), getattr(clip, name))


def test_missing_hands_and_gaze_are_not_blended_with_zeros():
    clip = clip_at(np.arange(FRAMES) / 20)
    clip.hands[4:6, 0] = 0
    clip.hands[0, 1] = clip.hands[-1, 1] = 0
    clip.gaze[7] = 0
    again = resampled(clip, 60.0)
    # Three frames for each one: frame 3 k lies on the old frame k.
    k = np.arange(len(again.hands)) / 3
    expected = np.ones((len(k), 2), bool)
    expected[(k > 3) & (k < 6), 0] = False
    expected[(k < 1) | (k > 10), 1] = False
    np.testing.assert_array_equal(again.present, expected)
    np.testing.assert_array_equal(again.gaze.any(axis=1), ~((k > 6) & (k < 8)))
    # What is drawn lies in 0.1 to 0.9; a blend with zero would not.
    assert again.hands[again.present].min() >= 0.1
    assert again.gaze[again.gaze.any(axis=1)].min() >= 0.1


def test_frames_next_to_missing_ones_survive_where_they_are_hit():
    clip = clip_at(np.arange(FRAMES) / 60)
    clip.hands[1::2, 0] = 0
    np.testing.assert_array_equal(resampled(clip, 30.0).hands, clip.hands[::2])


def test_boxes_are_those_of_the_nearest_frame_and_modalities_that_are_off_stay_off():
    clip = clip_at(np.arange(FRAMES) / 20)
    again = resampled(clip, 50.0)
    nearest = np.floor(np.arange(len(again.objects)) * 20 / 50 + 0.5).astype(int)
    np.testing.assert_array_equal(again.objects, clip.objects[nearest])
    np.testing.assert_array_equal(again.surrogate, clip.surrogate[nearest])
    again = resampled(Clip(clip.fps, clip.hands, None, None, None, clip.seconds), 30.0)
    assert (again.gaze, again.objects, again.surrogate) == (None, None, None)


def test_hole_in_the_timestamps_is_not_bridged():
    """30 s after the sixth frame; steps of up to 0.2 s are bridged, and the slow camera's own steps are no holes."""
    seconds = np.arange(FRAMES) / 23 + np.where(np.arange(FRAMES) > 5, 30, 0) + np.where(np.arange(FRAMES) > 8, 0.15, 0)
    again = resampled(clip_at(seconds), 23.0)
    inside = (again.seconds > seconds[5] + 1e-3) & (again.seconds < seconds[6] - 1e-3)
    assert inside.sum() >= 689
    np.testing.assert_array_equal(again.present.all(axis=1), ~inside)
    for values in (again.hands, again.gaze, again.objects, again.surrogate):
        np.testing.assert_array_equal(values.reshape(len(values), -1).any(axis=1), ~inside)
    slow = dataclasses.replace(clip_at(np.arange(FRAMES) / 2), fps=2.0)
    assert resampled(slow, 10.0).present.all()
    assert slow.holes().tolist() == []


def test_no_window_lies_in_a_hole(tmp_path):
    """30 s after the sixth of 12 frames, which check counts alike."""
    clips = {stem_of(p): clip_arrays(FRAMES if p == 1 else 3 * FRAMES, seed=p) for p in (1, 49, 60)}
    clips[stem_of(1)]["timestamps"] = np.arange(FRAMES) / 23 + np.where(np.arange(FRAMES) > 5, 30, 0)
    write_dataset(tmp_path, clips)
    config = config_for(tmp_path, resample=23.0)
    windows = load_dataset(config).train
    found = survey(config).splits
    assert found["train"].windows == len(windows) == 4
    assert found["train"].frames == len(windows.frames)
    assert [dict(tally.rates) for tally in found.values()] == [{(23, False): 1}, {(23, True): 1}, {(23, True): 1}]
    for start in windows.starts.tolist():
        assert windows.present[start : start + 8].any()
    # Without resampling every window is kept, as published.
    assert len(load_dataset(config_for(tmp_path)).train) == 2


@pytest.mark.parametrize("frames", [1, 2])
def test_very_short_clips(frames):
    clip = clip_at(np.arange(frames) / 20)
    again = resampled(clip, 20.0)
    np.testing.assert_array_equal(again.hands, clip.hands)
    assert resampled_length(clip.seconds, 40.0) == 2 * frames - 1


def read_at(path, rate, frames=FRAMES, **more):
    write_clip(path, clip_arrays(frames) | more)
    return read_clip(path, DataConfig(observed=4, predicted=4, resample=rate))


def test_length_counts_after_resampling(tmp_path):
    """Without timestamps a clip of participant 50 has 59 frames per second."""
    path = tmp_path / f"{stem_of(50)}.h5"
    with pytest.raises(ClipError, match="short: 6 frames at 30 per second, 8 needed"):
        read_at(path, 30.0)
    assert len(read_at(path, 30.0, frames=15).hands) == 8
    # 7 frames are too few at their own rate, and enough at twice that.
    assert len(read_at(path, 118.0, frames=7).hands) == 13
    with pytest.raises(ClipError, match="short: 0 frames, 8 needed"):
        read_at(path, 30.0, frames=0)


def test_timestamps_that_span_days_are_refused(tmp_path):
    seconds = np.arange(FRAMES) / 59
    seconds[-1] += 86_400
    with pytest.raises(ClipError, match=r"too long: its timestamps span 2,592,00\d frames at 30 per second"):
        read_at(tmp_path / f"{stem_of(50)}.h5", 30.0, timestamps=seconds)


def test_all_windows_of_a_dataset_run_at_the_one_rate(tmp_path):
    write_dataset(tmp_path, {stem_of(p): clip_arrays(60, seed=p) for p in (1, 49, 60)})
    dataset = load_dataset(config_for(tmp_path, resample=30.0))
    lengths = {split: len(getattr(dataset, split).frames) for split in ("train", "val", "test")}
    # 59 steps at 23 or at 59 frames per second.
    assert lengths == {"train": 77, "val": 31, "test": 31}
    for split in lengths:
        assert torch.equal(getattr(dataset, split).fps.unique(), torch.tensor([30.0]))
