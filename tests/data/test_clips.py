"""Single clips: what is read, and by which name every unusable one is refused."""

import dataclasses

import h5py
import numpy as np
import pytest
from data.dataset import clip_arrays as clip_datasets
from data.dataset import refusal as refusal_of

from bigru.config import DataConfig
from bigru.data.clips import published_frame_rate, read_clip
from bigru.data.hdf5 import ClipError
from bigru.data.index import IndexedClip, find_clip
from bigru.data.synthetic import write_clip

STEM = "p01-CAM_AV-BIAH_RB-BHO-0.0007253558395636801_1.4222339664428545"
LATE_STEM = "p29-CAM_AV-TOWER_MS-RPP-0_3.5"
FRAMES = 8
SHORT = DataConfig(observed=2, predicted=2)
ALL = dataclasses.replace(SHORT, gaze=True, objects=True, surrogate=True)
NAMES = ("left_landmarks", "right_landmarks", "norm_gaze", "rec_bboxes", "surrogate_hands")


def clip_arrays(frames=FRAMES, fps=23.0):
    return clip_datasets(frames) | {"timestamps": (np.arange(frames) / fps).astype(np.float32)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / f"{STEM}.h5"


def write(path, **changes):
    """Writes a clip with some of its datasets replaced, or left out where they are None."""
    arrays = clip_arrays() | changes
    write_clip(path, {name: values for name, values in arrays.items() if values is not None})


def refusal(path, config=SHORT):
    return refusal_of(path, config)


def assert_holds(clip, arrays):
    for name, values in zip(NAMES, (*clip.hands.swapaxes(0, 1), clip.gaze, clip.objects, clip.surrogate), strict=True):
        np.testing.assert_array_equal(values, arrays[name], name)


def test_clip_holds_what_was_written(path):
    arrays = clip_arrays()
    write_clip(path, arrays)
    clip = read_clip(path, ALL)
    assert_holds(clip, arrays)
    assert clip.hands.dtype == clip.objects.dtype == np.float32
    assert clip.present.all()


def test_hand_is_missing_only_where_all_its_landmarks_are_zero(path):
    arrays = clip_arrays()
    arrays["left_landmarks"][3] = 0
    arrays["right_landmarks"][5] = 0
    # One coordinate that is not zero, were it only z, makes the hand present.
    arrays["right_landmarks"][6] = 0
    arrays["right_landmarks"][6, 20, 2] = 1e-6
    write_clip(path, arrays)
    expected = np.ones((FRAMES, 2), bool)
    expected[3, 0] = expected[5, 1] = False
    np.testing.assert_array_equal(read_clip(path, SHORT).present, expected)


def test_older_layout_gives_hands_and_gaze_but_no_objects(path):
    write(path, rec_bboxes=None, surrogate_hands=None, bboxes=np.zeros((FRAMES, 36, 4), np.float32))
    clip = read_clip(path, dataclasses.replace(SHORT, gaze=True))
    assert clip.hands.shape == (FRAMES, 2, 21, 3)
    assert clip.gaze is not None
    assert clip.objects is None
    assert refusal(path, ALL) == ("missing dataset", "rec_bboxes, surrogate_hands (the older layout, bboxes only)")


def test_a_modality_that_is_off_is_not_looked_at(path):
    write(path, rec_bboxes=np.full((FRAMES, 30, 4), np.nan), norm_gaze=np.zeros((3, 2), np.float32))
    read_clip(path, SHORT)


@pytest.mark.parametrize(
    ("timestamps", "assumed"),
    [
        pytest.param(np.arange(FRAMES) / 29.97, "", id="measured"),
        pytest.param(np.cumsum([0, 1, 1, 9, 1, 1, 9, 1]) / 30, "", id="median-step"),
        pytest.param(None, "no timestamps", id="absent"),
        pytest.param(np.array([b"0.1"] * FRAMES), "timestamps are no numbers", id="text"),
        pytest.param(np.arange(FRAMES)[:, None] / 23, "timestamps of shape (8, 1), expected (F,)", id="column"),
        pytest.param(np.full(FRAMES, np.nan), "timestamps are not finite", id="nan"),
        pytest.param(-np.arange(FRAMES) / 23, "timestamps do not rise", id="backwards"),
        pytest.param(np.zeros(FRAMES), "timestamps do not rise", id="standing-still"),
        pytest.param(np.arange(FRAMES), "timestamps are frame numbers", id="whole"),
        pytest.param(np.arange(5.0, FRAMES + 5), "timestamps are frame numbers", id="floats-from-5"),
    ],
)
def test_frame_rate_and_why_it_is_assumed(tmp_path, timestamps, assumed):
    for name in (STEM, LATE_STEM, "mine"):
        write(tmp_path / f"{name}.h5", timestamps=timestamps)
    for stem, documented in ((STEM, 23), (LATE_STEM, 59)):
        clip = read_clip(tmp_path / f"{stem}.h5", SHORT)
        assert clip.assumed == assumed
        assert clip.fps == (documented if assumed else 30)
        if assumed:
            assert clip.rate == f"{documented} per second (assumed: {assumed})"
            np.testing.assert_allclose(clip.seconds, np.arange(FRAMES) / documented)
    # A name of one's own tells no participant whose rate could be assumed.
    if assumed:
        expected = f"{assumed}, and the clip's name tells no participant, whose rate is documented; predict takes --fps"
        assert refusal(tmp_path / "mine.h5") == ("bad timestamps", expected)
    else:
        assert read_clip(tmp_path / "mine.h5", SHORT).fps == 30


def test_frame_numbers_tell_which_frames_are_lacking(path):
    assert [published_frame_rate(p) for p in (1, 28, 29, 70)] == [23.0, 23.0, 59.0, 59.0]
    numbers = np.array([0, 1, 2, 3, 9, 10, 11, 12])
    write(path, timestamps=numbers)
    np.testing.assert_allclose(read_clip(path, SHORT).seconds, numbers / 23)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        pytest.param(1e3, "they tell 0.023 frames per second, ", id="milliseconds"),
        pytest.param(1e-6, "they tell 2.3e+07 frames per second, ", id="megaseconds"),
        pytest.param(1e-320, "they tell inf frames per second, ", id="beyond-any-number"),
        pytest.param(23 / 0.99, "they tell 0.99 frames per second, ", id="just-too-slow"),
        pytest.param(23 / 1001, "they tell 1e+03 frames per second, ", id="just-too-fast"),
        pytest.param(23 / 1000, None, id="fastest"),
        pytest.param(22.9, None, id="slowest"),
    ],
)
def test_timestamps_that_tell_an_impossible_rate(path, scale, told):
    write(path, timestamps=scale * np.arange(FRAMES) / 23)
    if told is None:
        assert read_clip(path, SHORT).fps == round(23 / scale)
    else:
        assert refusal(path) == ("bad timestamps", told + "expected seconds, 1 to 1,000 frames each")


def test_other_floating_point_types_are_read_as_float32(path):
    arrays = clip_arrays()
    arrays["left_landmarks"] = arrays["left_landmarks"].astype(">f8")
    arrays["right_landmarks"] = arrays["right_landmarks"].astype(np.float16)
    write_clip(path, arrays)
    assert_holds(read_clip(path, ALL), {name: values.astype(np.float32) for name, values in arrays.items()})


@pytest.mark.parametrize(("frames", "usable"), [(0, False), (3, False), (4, True)])
def test_short_clip(path, frames, usable):
    write_clip(path, clip_arrays(frames))
    if usable:
        assert len(read_clip(path, SHORT).hands) == frames
    else:
        assert refusal(path) == ("short", f"{frames} frames, 4 needed")


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99, None])
def test_missing_or_truncated_file_or_one_that_is_not_hdf5(path, keep):
    assert refusal(path)[0] == "missing"
    write(path)
    content = path.read_bytes() if keep is not None else b"participant\tcamera\n" * 1000
    path.write_bytes(content[: keep if isinstance(keep, int) else int((keep or 1) * len(content))])
    assert refusal(path)[0] == "unreadable"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("left_landmarks", (FRAMES, 21, 2)),
        ("right_landmarks", (FRAMES, 63)),
        ("norm_gaze", (2, FRAMES)),
        ("rec_bboxes", (FRAMES, 36, 4)),
        ("surrogate_hands", (FRAMES, 2, 4, 1)),
        ("left_landmarks", ()),
        ("norm_gaze", None),
    ],
)
def test_wrong_shape(path, name, shape):
    write(path, **{name: h5py.Empty("f4") if shape is None else np.zeros(shape, np.float32)})
    reason, detail = refusal(path, ALL)
    assert reason == "wrong shape"
    assert name in detail
    assert shape is None or str(shape) in detail


@pytest.mark.parametrize("name", NAMES)
def test_missing_dataset(path, name):
    write(path, **{name: None})
    assert refusal(path, ALL) == ("missing dataset", name)
    with h5py.File(path, "a") as file:
        file.create_group(name)
    assert refusal(path, ALL) == ("missing dataset", name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values(path, name, value):
    arrays = clip_arrays()
    arrays[name][5, 1] = value
    write_clip(path, arrays)
    cure = "; zeros mean missing, and with --nan-missing NaN does too" if np.isnan(value) else ""
    assert refusal(path, ALL) == ("non-finite", f"{name} in frame 5{cure}")
    if not np.isnan(value):
        assert refusal(path, dataclasses.replace(ALL, nan_missing=True))[0] == "non-finite"


def test_nan_read_as_missing(path):
    """One NaN makes a hand or a gaze missing whole, boxes one by one."""
    arrays = clip_arrays()
    arrays["left_landmarks"][5, 1, 0] = arrays["norm_gaze"][4, 1] = np.nan
    arrays["rec_bboxes"][3, 7, 2] = arrays["surrogate_hands"][2, 1, 3] = np.nan
    write_clip(path, arrays)
    clip = read_clip(path, dataclasses.replace(ALL, nan_missing=True))
    arrays["left_landmarks"][5] = arrays["norm_gaze"][4] = 0
    arrays["rec_bboxes"][3, 7] = arrays["surrogate_hands"][2, 1] = 0
    assert_holds(clip, arrays)
    assert clip.present.sum() == 2 * FRAMES - 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_depth_that_nothing_reads_is_no_reason_to_refuse(path, value):
    """Nor does it make a hand present."""
    arrays = clip_arrays()
    arrays["left_landmarks"][5, :, 2] = value
    arrays["left_landmarks"][6] = 0, 0, value
    write_clip(path, arrays)
    clip = read_clip(path, SHORT)
    np.testing.assert_array_equal(clip.hands[:6, 0, :, :2], arrays["left_landmarks"][:6, :, :2])
    assert np.isfinite(clip.hands).all()
    np.testing.assert_array_equal(clip.present[:, 0], np.arange(FRAMES) != 6)


@pytest.mark.parametrize("value", [-10.5, 10.5, 1728.0, -3e38])
@pytest.mark.parametrize(
    ("name", "place"),
    [("left_landmarks", (20, 0)), ("right_landmarks", (0, 1)), ("rec_bboxes", (29, 3)), ("surrogate_hands", (1, 0))],
)
def test_values_far_outside_the_image(path, name, place, value):
    arrays = clip_arrays()
    arrays[name][5, *place] = value
    write_clip(path, arrays)
    expected = "expected image-normalised values, -10 to 10"
    assert refusal(path, ALL) == ("out of range", f"{name} in frame 5 holds {value:g}, {expected}")


def test_values_a_little_outside_the_image_and_those_with_other_scales(path):
    arrays = clip_arrays()
    arrays["left_landmarks"][2, 3, :2] = -0.06, 10
    arrays["rec_bboxes"][2, 3] = -10
    # Wrist-relative depth, and where a line of sight meets the image's plane.
    arrays["right_landmarks"][2, 3, 2] = -300
    arrays["norm_gaze"][2] = 40, -40
    write_clip(path, arrays)
    assert_holds(read_clip(path, ALL), arrays)


def test_value_too_large_for_float32(path):
    large = np.ones((FRAMES, 21, 3))
    large[2, 0, 0] = 1e300
    write(path, left_landmarks=large)
    assert refusal(path) == ("non-finite", "left_landmarks in frame 2")


@pytest.mark.parametrize("name", ["right_landmarks", "norm_gaze", "rec_bboxes", "surrogate_hands", "timestamps"])
def test_frame_counts_that_differ(path, name):
    write(path, **{name: clip_arrays()[name][:-1]})
    reason, detail = refusal(path, ALL)
    assert reason == "frame counts differ"
    assert f"{name} {FRAMES - 1}" in detail


@pytest.mark.parametrize("dtype", [object, "S4", bool, np.int16, np.uint8, np.complex64, [("x", "f4")]], ids=str)
def test_wrong_dtype(path, dtype):
    write(path, left_landmarks=None)
    with h5py.File(path, "a") as file:
        stored = h5py.string_dtype() if dtype is object else np.dtype(dtype)
        file.create_dataset("left_landmarks", shape=(FRAMES, 21, 3), dtype=stored)
    reason, detail = refusal(path)
    assert reason == "wrong dtype"
    assert detail.startswith("left_landmarks is ")
    assert detail.endswith(", expected a floating-point type, such as float32")


@pytest.mark.parametrize("kind", ["external", "dangling", "soft", "virtual", "raw"])
def test_links_are_not_followed(path, kind):
    name, values, other = "right_landmarks", clip_arrays()["right_landmarks"], path.with_name("other.h5")
    write(path, right_landmarks=None)
    write_clip(other, {name: values})
    (path.parent / "values.bin").write_bytes(values.tobytes())
    with h5py.File(path, "a") as file:
        match kind:
            case "external":
                file[name] = h5py.ExternalLink(str(other), name)
            case "dangling":
                file[name] = h5py.ExternalLink("nowhere.h5", name)
            case "soft":
                file[name] = h5py.SoftLink("/left_landmarks")
            case "virtual":
                layout = h5py.VirtualLayout(values.shape, "f4")
                layout[:] = h5py.VirtualSource(str(other), name, values.shape)
                file.create_virtual_dataset(name, layout)
            case "raw":
                place = [(str(path.parent / "values.bin"), 0, values.nbytes)]
                file.create_dataset(name, values.shape, "f4", external=place)
    reason, detail = refusal(path)
    assert reason == "linked"
    assert detail.startswith(name)


def test_clip_is_found_in_its_subtask_folder_first_then_flat(tmp_path):
    row = IndexedClip(STEM, 1, "BHO")
    with pytest.raises(ClipError, match="missing"):
        find_clip(tmp_path, row)
    write_clip(tmp_path / f"{STEM}.h5", {})
    assert find_clip(tmp_path, row) == tmp_path / f"{STEM}.h5"
    write_clip(tmp_path / "BHO" / f"{STEM}.h5", {})
    assert find_clip(tmp_path, row) == tmp_path / "BHO" / f"{STEM}.h5"


def test_name_longer_than_the_file_system_allows(tmp_path):
    with pytest.raises(ClipError, match="unreadable"):
        find_clip(tmp_path, IndexedClip(STEM + "1" * 300, 1, "BHO"))
