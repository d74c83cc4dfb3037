"""Clips that cannot be used: counted and listed, refused where strict, and what is said where none is left."""

import os

import numpy as np
import pytest
from data.dataset import clip_arrays, config_for, stem_of, write_dataset

from bigru.data.hdf5 import ClipError
from bigru.data.synthetic import write_index
from bigru.data.windows import NoWindowsError, load_dataset


def broken_dataset(root):
    """Three good clips and one of each kind of bad one; return the reason expected for each stem."""
    nan = clip_arrays(8)
    nan["left_landmarks"][0] = np.nan
    bare = clip_arrays(8)
    del bare["norm_gaze"]
    pixels = clip_arrays(8)
    pixels["right_landmarks"][..., :2] *= 972
    bad = {
        "missing": None,
        "short": clip_arrays(7),
        "wrong shape": clip_arrays(8) | {"left_landmarks": np.zeros((8, 20, 3), np.float32)},
        "missing dataset": bare,
        "non-finite": nan,
        "frame counts differ": clip_arrays(8) | {"right_landmarks": np.zeros((9, 21, 3), np.float32)},
        "out of range": pixels,
        "wrong dtype": clip_arrays(8) | {"left_landmarks": np.ones((8, 21, 3), np.int32)},
        "bad timestamps": clip_arrays(8) | {"timestamps": 1000 * np.arange(8) / 23},
        "unreadable": clip_arrays(8),
    }
    stems = {reason: stem_of(2, number) for number, reason in enumerate(bad)}
    good = {stem_of(p): clip_arrays(8) for p in (1, 49, 60)}
    write_dataset(root, {stems[reason]: arrays for reason, arrays in bad.items()} | good)
    path = root / "BHO" / f"{stems['unreadable']}.h5"
    path.write_bytes(path.read_bytes()[:-500])
    return stems


def test_unusable_clips_are_counted_and_listed(tmp_path):
    stems = broken_dataset(tmp_path)
    dataset = load_dataset(config_for(tmp_path, gaze=True))
    assert {skip.reason: skip.stem for skip in dataset.skipped} == stems
    assert dataset.skip_counts() == dict.fromkeys(stems, 1)
    assert dataset.clips == {"train": 1, "val": 1, "test": 1}
    assert dataset.listed == len(stems) + 3
    text = dataset.describe()
    for reason, stem in stems.items():
        assert f"{reason}: 1\n    {stem}: " in text
    assert f"skipped {len(stems)}:" in text


def test_strict_stops_at_the_first_unusable_clip(tmp_path):
    stems = broken_dataset(tmp_path)
    for reason, stem in stems.items():
        others = [other for other in stems.values() if other != stem]
        write_index(tmp_path, [stem_of(1), stem, *others, stem_of(49), stem_of(60)])
        with pytest.raises(ClipError, match=stem) as caught:
            load_dataset(config_for(tmp_path, gaze=True, strict=True))
        assert caught.value.reason == reason


def test_strict_reads_a_sound_dataset_and_refuses_an_index_that_repeats_itself(three_clips):
    root, clips = three_clips
    dataset = load_dataset(config_for(root, strict=True))
    assert [len(windows) for windows in (dataset.train, dataset.val, dataset.test)] == [1, 2, 5]
    assert dataset.skipped == ()
    assert "skipped" not in dataset.describe()
    write_index(root, [*clips, stem_of(48)])
    assert load_dataset(config_for(root)).skip_counts() == {"duplicate": 1}
    with pytest.raises(ClipError, match="line 5 repeats line 2"):
        load_dataset(config_for(root, strict=True))


def test_description_stays_short_with_thousands_of_missing_clips(tmp_path):
    write_dataset(tmp_path, {stem_of(p): clip_arrays(8) for p in (1, 49, 60)})
    present = [stem_of(p) for p in (1, 49, 60)]
    write_index(tmp_path, present + [stem_of(3, number) for number in range(3000)])
    dataset = load_dataset(config_for(tmp_path, no_cache=True))
    assert dataset.skip_counts() == {"missing": 3000}
    lines = dataset.describe().splitlines()
    assert len(lines) == 11
    assert "  missing: 3,000" in lines
    assert "    and 2,998 more" in lines


@pytest.mark.skipif(os.name != "posix", reason="needs names that are no text")
def test_folder_whose_name_is_no_utf_8(tmp_path):
    root = tmp_path / os.fsdecode(b"d\xe4ta")
    write_dataset(root, {stem_of(p): clip_arrays(8, seed=p) for p in (1, 49, 60)})
    for _ in ("read", "mapped"):
        assert load_dataset(config_for(root)).describe().encode().count(b"d\\xe4ta") == 3
    with pytest.raises(NoWindowsError) as caught:
        load_dataset(config_for(root, observed=5, predicted=5))
    assert b"d\\xe4ta" in str(caught.value).encode()


def test_no_windows_error_tells_where_and_why(tmp_path):
    write_dataset(tmp_path, {stem_of(1): clip_arrays(8), stem_of(49): clip_arrays(7), stem_of(60): None})
    with pytest.raises(NoWindowsError) as caught:
        load_dataset(config_for(tmp_path))
    text = str(caught.value)
    assert text.startswith("no window of 4 + 4 frames in val, test (split by participant: train 1-48, val 49-59")
    assert f"3 clips listed in {tmp_path / 'subtasks_byTask_time.csv'}, read from {tmp_path}" in text
    assert f"{stem_of(49)}: 7 frames, 8 needed" in text
    assert f"{stem_of(60)}: no .h5 file in" in text
    assert text.endswith("hint: --split time cuts every clip into train, val and test")


def test_no_hint_that_cannot_help_and_how_long_a_clip_would_have_to_be(tmp_path):
    write_dataset(tmp_path, {stem_of(1): clip_arrays(7)})
    with pytest.raises(NoWindowsError, match="in train, val, test") as caught:
        load_dataset(config_for(tmp_path))
    assert "hint:" not in str(caught.value)
    write_dataset(tmp_path, {stem_of(1): clip_arrays(23)})
    with pytest.raises(NoWindowsError, match="a clip of 24 frames or more"):
        load_dataset(config_for(tmp_path, split="time"))
