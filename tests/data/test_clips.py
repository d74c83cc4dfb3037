"""The index and single clips: what is read, and by which name every unusable clip is refused."""

import dataclasses

import h5py
import numpy as np
import pytest
from data.dataset import clip_arrays as clip_datasets

from bigru.arguments import read_yaml
from bigru.config import DataConfig
from bigru.data.clips import published_frame_rate, read_clip
from bigru.data.hdf5 import ClipError, DataError
from bigru.data.index import COLUMNS, INDEX_NAME, IndexedClip, find_clip, find_index, read_index
from bigru.data.synthetic import write_clip, write_index

STEM = "p01-CAM_AV-BIAH_RB-BHO-0.0007253558395636801_1.4222339664428545"
LATE_STEM = "p29-CAM_AV-TOWER_MS-RPP-0_3.5"
FRAMES = 8
NAN_PLACES = {"left_landmarks": (5, 1, 0), "norm_gaze": (4, 1), "rec_bboxes": (3, 7, 2), "surrogate_hands": (2, 1, 3)}
SHORT = DataConfig(observed=2, predicted=2)
ALL = DataConfig(observed=2, predicted=2, gaze=True, objects=True, surrogate=True)


def row_of(stem):
    participant, camera, task, subtask, times = stem.split("-")
    return (participant, camera, task, subtask, *times.split("_"), f"{stem}.mp4")


ROW = row_of(STEM)


def clip_arrays(frames=FRAMES, fps=23.0):
    arrays = clip_datasets(frames)
    return arrays | {"timestamps": (np.arange(frames) / fps).astype(np.float32)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / f"{STEM}.h5"


def write_rows(path, *rows, header=COLUMNS):
    path.write_bytes(b"\n".join("\t".join(row).encode() for row in (header, *rows)) + b"\n")
    return path


def refusal(path, config=SHORT):
    with pytest.raises(ClipError) as caught:
        read_clip(path, config)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason, caught.value.detail


def test_clip_holds_what_was_written(path):
    arrays = clip_arrays()
    write_clip(path, arrays)
    clip = read_clip(path, ALL)
    np.testing.assert_array_equal(clip.hands[:, 0], arrays["left_landmarks"])
    np.testing.assert_array_equal(clip.hands[:, 1], arrays["right_landmarks"])
    np.testing.assert_array_equal(clip.gaze, arrays["norm_gaze"])
    np.testing.assert_array_equal(clip.objects, arrays["rec_bboxes"])
    np.testing.assert_array_equal(clip.surrogate, arrays["surrogate_hands"])
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
    arrays = clip_arrays()
    del arrays["rec_bboxes"], arrays["surrogate_hands"]
    arrays["bboxes"] = np.zeros((FRAMES, 36, 4), np.float32)
    write_clip(path, arrays)
    clip = read_clip(path, DataConfig(observed=2, predicted=2, gaze=True))
    assert clip.hands.shape == (FRAMES, 2, 21, 3)
    assert clip.gaze is not None
    assert clip.objects is None
    assert refusal(path, ALL) == ("missing dataset", "rec_bboxes, surrogate_hands (the older layout, bboxes only)")


def test_a_modality_that_is_off_is_not_looked_at(path):
    arrays = clip_arrays()
    arrays["rec_bboxes"][:] = np.nan
    arrays["norm_gaze"] = arrays["norm_gaze"][:3]
    write_clip(path, arrays)
    read_clip(path, SHORT)


@pytest.mark.parametrize(
    ("stem", "timestamps", "fps"),
    [
        pytest.param(STEM, np.arange(FRAMES) / 29.97, 30.0, id="from-timestamps"),
        pytest.param(STEM, np.cumsum([0, 1, 1, 9, 1, 1, 9, 1]) / 59, 59.0, id="median-step"),
        pytest.param(STEM, None, 23.0, id="absent-p01"),
        pytest.param(LATE_STEM, None, 59.0, id="absent-p29"),
        pytest.param(STEM, np.full(FRAMES, np.nan), 23.0, id="nan"),
        pytest.param(STEM, np.zeros(FRAMES), 23.0, id="standing-still"),
        pytest.param(LATE_STEM, -np.arange(FRAMES), 59.0, id="backwards"),
        pytest.param(STEM, np.zeros((FRAMES, 2)), 23.0, id="wrong-rank"),
    ],
)
def test_frame_rate(tmp_path, stem, timestamps, fps):
    arrays = clip_arrays()
    del arrays["timestamps"]
    if timestamps is not None:
        arrays["timestamps"] = timestamps.astype(np.float32)
    write_clip(tmp_path / f"{stem}.h5", arrays)
    assert read_clip(tmp_path / f"{stem}.h5", SHORT).fps == fps


@pytest.mark.parametrize(
    ("timestamps", "assumed"),
    [
        pytest.param(np.arange(FRAMES) / 29.97, "", id="measured"),
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
def test_assumed_frame_rate_is_called_so(tmp_path, timestamps, assumed):
    arrays = clip_arrays()
    del arrays["timestamps"]
    if timestamps is not None:
        arrays["timestamps"] = timestamps
    write_clip(tmp_path / f"{STEM}.h5", arrays)
    clip = read_clip(tmp_path / f"{STEM}.h5", SHORT)
    assert clip.assumed == assumed
    if assumed:
        assert clip.fps == 23
        assert clip.rate == f"23 per second (assumed: {assumed})"
        np.testing.assert_allclose(clip.seconds, np.arange(FRAMES) / 23)
    # A name of one's own tells no participant whose rate could be assumed.
    write_clip(tmp_path / "mine.h5", arrays)
    if assumed:
        expected = f"{assumed}, and the clip's name tells no participant, whose rate is documented; predict takes --fps"
        assert refusal(tmp_path / "mine.h5") == ("bad timestamps", expected)
    else:
        assert read_clip(tmp_path / "mine.h5", SHORT).fps == 30


def test_frame_numbers_tell_which_frames_are_lacking(path):
    write_clip(path, clip_arrays() | {"timestamps": np.array([0, 1, 2, 3, 9, 10, 11, 12])})
    np.testing.assert_allclose(read_clip(path, SHORT).seconds, np.array([0, 1, 2, 3, 9, 10, 11, 12]) / 23)


def test_published_frame_rate_changes_after_participant_28():
    assert [published_frame_rate(p) for p in (1, 28, 29, 70)] == [23.0, 23.0, 59.0, 59.0]


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        pytest.param(1e3, "they tell 0.023 frames per second, ", id="milliseconds"),
        pytest.param(1e-6, "they tell 2.3e+07 frames per second, ", id="megaseconds"),
        pytest.param(1e-40, "they tell 2.3e+41 frames per second, ", id="denormal"),
        pytest.param(1e-320, "they tell inf frames per second, ", id="beyond-any-number"),
        pytest.param(23 / 0.99, "they tell 0.99 frames per second, ", id="just-too-slow"),
        pytest.param(23 / 1001, "they tell 1e+03 frames per second, ", id="just-too-fast"),
        pytest.param(23 / 1000, None, id="fastest"),
        pytest.param(22.9, None, id="slowest"),
    ],
)
def test_timestamps_that_tell_an_impossible_rate(path, scale, told):
    write_clip(path, clip_arrays() | {"timestamps": scale * np.arange(FRAMES) / 23})
    if told is None:
        assert read_clip(path, SHORT).fps == round(23 / scale)
    else:
        assert refusal(path) == ("bad timestamps", told + "expected seconds, 1 to 1,000 frames each")


def test_other_floating_point_types_are_read_as_float32(path):
    arrays = clip_arrays()
    arrays["left_landmarks"] = arrays["left_landmarks"].astype(">f8")
    arrays["right_landmarks"] = arrays["right_landmarks"].astype(np.float16)
    write_clip(path, arrays)
    hands = read_clip(path, SHORT).hands
    np.testing.assert_array_equal(hands[:, 0], arrays["left_landmarks"].astype(np.float32))
    np.testing.assert_array_equal(hands[:, 1], arrays["right_landmarks"].astype(np.float32))


def test_missing_file(path):
    assert refusal(path)[0] == "missing"


@pytest.mark.parametrize(("frames", "usable"), [(0, False), (3, False), (4, True)])
def test_short_clip(path, frames, usable):
    write_clip(path, clip_arrays(frames))
    if usable:
        assert len(read_clip(path, SHORT).hands) == frames
    else:
        assert refusal(path) == ("short", f"{frames} frames, 4 needed")


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99])
def test_truncated_file(path, keep):
    write_clip(path, clip_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert refusal(path)[0] == "unreadable"


def test_file_that_is_not_hdf5(path):
    path.write_bytes(b"participant\tcamera\n" * 1000)
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
    ],
)
def test_wrong_shape(path, name, shape):
    write_clip(path, clip_arrays() | {name: np.zeros(shape, np.float32)})
    reason, detail = refusal(path, ALL)
    assert reason == "wrong shape"
    assert name in detail
    assert str(shape) in detail


def test_dataset_without_a_shape(path):
    write_clip(path, clip_arrays() | {"norm_gaze": h5py.Empty("f4")})
    assert refusal(path, ALL)[0] == "wrong shape"


@pytest.mark.parametrize("name", ["left_landmarks", "right_landmarks", "norm_gaze", "rec_bboxes", "surrogate_hands"])
def test_missing_dataset(path, name):
    arrays = clip_arrays()
    del arrays[name]
    write_clip(path, arrays)
    assert refusal(path, ALL) == ("missing dataset", name)


def test_group_in_place_of_a_dataset(path):
    arrays = clip_arrays()
    del arrays["norm_gaze"]
    write_clip(path, arrays)
    with h5py.File(path, "a") as file:
        file.create_group("norm_gaze")
    assert refusal(path, ALL) == ("missing dataset", "norm_gaze")


@pytest.mark.parametrize("name", ["left_landmarks", "right_landmarks", "norm_gaze", "rec_bboxes", "surrogate_hands"])
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
    for name, place in NAN_PLACES.items():
        arrays[name][place] = np.nan
    write_clip(path, arrays)
    clip = read_clip(path, dataclasses.replace(ALL, nan_missing=True))
    arrays["left_landmarks"][5] = arrays["norm_gaze"][4] = 0
    arrays["rec_bboxes"][3, 7] = arrays["surrogate_hands"][2, 1] = 0
    np.testing.assert_array_equal(clip.hands[:, 0], arrays["left_landmarks"])
    np.testing.assert_array_equal(clip.gaze, arrays["norm_gaze"])
    np.testing.assert_array_equal(clip.objects, arrays["rec_bboxes"])
    np.testing.assert_array_equal(clip.surrogate, arrays["surrogate_hands"])
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
    clip = read_clip(path, ALL)
    np.testing.assert_array_equal(clip.hands[:, 0], arrays["left_landmarks"])
    np.testing.assert_array_equal(clip.hands[:, 1], arrays["right_landmarks"])
    np.testing.assert_array_equal(clip.gaze, arrays["norm_gaze"])


def test_value_too_large_for_float32(path):
    arrays = clip_arrays()
    arrays["left_landmarks"] = arrays["left_landmarks"].astype(np.float64)
    arrays["left_landmarks"][2, 0, 0] = 1e300
    write_clip(path, arrays)
    assert refusal(path) == ("non-finite", "left_landmarks in frame 2")


@pytest.mark.parametrize("name", ["right_landmarks", "norm_gaze", "rec_bboxes", "surrogate_hands", "timestamps"])
def test_frame_counts_that_differ(path, name):
    arrays = clip_arrays()
    arrays[name] = arrays[name][:-1]
    write_clip(path, arrays)
    reason, detail = refusal(path, ALL)
    assert reason == "frame counts differ"
    assert f"{name} {FRAMES - 1}" in detail


@pytest.mark.parametrize("dtype", [object, "S4", bool, np.int16, np.uint8, np.complex64, [("x", "f4")]], ids=str)
def test_wrong_dtype(path, dtype):
    arrays = clip_arrays()
    del arrays["left_landmarks"]
    write_clip(path, arrays)
    with h5py.File(path, "a") as file:
        stored = h5py.string_dtype() if dtype is object else np.dtype(dtype)
        file.create_dataset("left_landmarks", shape=(FRAMES, 21, 3), dtype=stored)
    reason, detail = refusal(path)
    assert reason == "wrong dtype"
    assert detail.startswith("left_landmarks is ")
    assert detail.endswith(", expected a floating-point type, such as float32")


@pytest.mark.parametrize("kind", ["external", "dangling", "soft", "virtual", "raw"])
def test_links_are_not_followed(path, kind):
    arrays = clip_arrays()
    values = arrays.pop("right_landmarks")
    write_clip(path, arrays)
    other = path.with_name("other.h5")
    write_clip(other, {"right_landmarks": values})
    (path.parent / "values.bin").write_bytes(values.tobytes())
    with h5py.File(path, "a") as file:
        match kind:
            case "external":
                file["right_landmarks"] = h5py.ExternalLink(str(other), "right_landmarks")
            case "dangling":
                file["right_landmarks"] = h5py.ExternalLink("nowhere.h5", "right_landmarks")
            case "soft":
                file["right_landmarks"] = h5py.SoftLink("/left_landmarks")
            case "virtual":
                layout = h5py.VirtualLayout(values.shape, "f4")
                layout[:] = h5py.VirtualSource(str(other), "right_landmarks", values.shape)
                file.create_virtual_dataset("right_landmarks", layout)
            case "raw":
                place = [(str(path.parent / "values.bin"), 0, values.nbytes)]
                file.create_dataset("right_landmarks", values.shape, "f4", external=place)
    reason, detail = refusal(path)
    assert reason == "linked"
    assert detail.startswith("right_landmarks")


def test_index_rows_in_order_and_times_as_text(tmp_path):
    index = read_index(write_index(tmp_path, [STEM, LATE_STEM]))
    assert index.clips == (IndexedClip(STEM, 1, "BHO"), IndexedClip(LATE_STEM, 29, "RPP"))
    assert (index.skipped, index.other_cameras) == ((), 0)


@pytest.mark.parametrize(
    ("header", "row", "written"),
    [
        pytest.param(COLUMNS, ROW, "{}\n{}\n", id="plain"),
        pytest.param(COLUMNS, ROW, "\ufeff{}\r\n{}\r\n\r\n", id="bom-and-windows-line-ends"),
        pytest.param(COLUMNS[::-1], ROW[::-1], "{}\n{}", id="other-column-order"),
        pytest.param((*COLUMNS, "", ""), (*ROW, "", ""), "{}\n{}\n", id="other-columns-of-one-name"),
        pytest.param([f'"{name}"' for name in COLUMNS], [f'"{field}"' for field in ROW], "{}\n{}\n", id="quoted"),
    ],
)
def test_index_as_programs_write_it(tmp_path, header, row, written):
    path = tmp_path / INDEX_NAME
    path.write_bytes(written.format("\t".join(header), "\t".join(row)).encode())
    index = read_index(path)
    assert (index.clips, index.skipped) == ((IndexedClip(STEM, 1, "BHO"),), ())


def test_index_counts_other_cameras_and_skips_repeated_rows(tmp_path):
    other = row_of(STEM.replace("CAM_AV", "CAM_LL"))
    index = read_index(write_rows(tmp_path / "index.csv", row_of(STEM), other, row_of(LATE_STEM), row_of(STEM)))
    assert [clip.stem for clip in index.clips] == [STEM, LATE_STEM]
    assert index.other_cameras == 1
    assert [(skip.stem, skip.reason, skip.detail) for skip in index.skipped] == [
        (STEM, "duplicate", "line 5 repeats line 2")
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "p01-CAM_AV-BIAH_RB-../BHO-0_1.mp4",
        "p01-CAM_AV-BIAH_RB-BHO-0_1..2.mp4",
        "p01-CAM_AV-BIAH_RB-BHO-0_1/2.mp4",
        "p01-CAM_AV-BIAH_RB-BHO-0_1\\2.mp4",
        "p01-CAM_AV-BIAH_RB-BHO-0_1e5.mp4",
        "p01-CAM_AV-BIAH_RB-BHO-0_1.h5",
        "",
        "p02-CAM_AV-BIAH_RB-BHO-0_1.mp4",
        "p01-CAM_LL-BIAH_RB-BHO-0_1.mp4",
        "p01-CAM_AV-BIAH_RB-RPP-0_1.mp4",
    ],
)
def test_unusable_names_are_skipped(tmp_path, name):
    row = (*row_of("p01-CAM_AV-BIAH_RB-BHO-0_1")[:6], name)
    index = read_index(write_rows(tmp_path / "index.csv", row, row_of(LATE_STEM)))
    assert [clip.stem for clip in index.clips] == [LATE_STEM]
    assert [skip.reason for skip in index.skipped] == ["bad name"]


def test_digits_of_other_scripts_are_no_digits(tmp_path):
    index = read_index(write_rows(tmp_path / "index.csv", row_of("p\u0660\u0661-CAM_AV-BIAH_RB-BHO-0_1")))
    assert [skip.reason for skip in index.skipped] == ["bad name"]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        pytest.param(b"", 1, "empty", id="empty"),
        pytest.param("\t".join(COLUMNS).encode() + b"\n", 2, "no row", id="header-only"),
        pytest.param(b"participant\tcamera\ttask\nx\ty\tz\n", 1, "no column subtask", id="columns-missing"),
        pytest.param("\t".join((*COLUMNS, "task")).encode() + b"\n", 1, "repeated column task", id="column-twice"),
        pytest.param(",".join(COLUMNS).encode() + b"\n", 1, "no column participant", id="commas"),
        pytest.param(b"\x89HDF\r\n\x1a\n\x00\x00\xff\xfe", 1, "not text", id="binary"),
        pytest.param("\t".join(COLUMNS).encode() + b"\na\tb\x00\n", 2, "not text", id="nul"),
        pytest.param("\t".join(COLUMNS).encode() + b"\n\np01\tCAM_AV\n", 3, "2 columns", id="narrow-row"),
    ],
)
def test_bad_index_names_file_line_and_expectation(tmp_path, content, line, words):
    path = tmp_path / "index.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected tab-separated columns participant camera task") as caught:
        read_index(path)
    assert isinstance(caught.value, ValueError)
    assert f"index {path}, line {line}: " in str(caught.value)
    assert words in str(caught.value)


def test_index_in_the_root_then_beside_it_then_an_error_naming_both(tmp_path):
    root = tmp_path / "clips"
    root.mkdir()
    config = DataConfig(data_root=root)
    with pytest.raises(FileNotFoundError) as caught:
        find_index(config)
    assert str(root / INDEX_NAME) in str(caught.value)
    assert str(tmp_path / INDEX_NAME) in str(caught.value)
    write_index(tmp_path, [STEM])
    assert find_index(config).samefile(tmp_path / INDEX_NAME)
    write_index(root, [STEM])
    assert find_index(config) == root / INDEX_NAME


def test_index_beside_a_link_to_the_root_or_beside_what_it_leads_to(tmp_path):
    (tmp_path / "disk" / "clips").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    root = tmp_path / "home" / "clips"
    root.symlink_to(tmp_path / "disk" / "clips")
    far = write_index(tmp_path / "disk", [STEM])
    assert find_index(DataConfig(data_root=root)).samefile(far)
    near = write_index(tmp_path / "home", [STEM])
    assert find_index(DataConfig(data_root=root)) == near


def test_index_that_a_reference_configuration_names_in_vain(tmp_path):
    write_index(tmp_path, [STEM])
    settings = tmp_path / "reference.yaml"
    settings.write_text(f"data: {{csv_path: gone.csv, h5_dir: {tmp_path}}}")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv, as index says \(in a reference.*: csv_path\)") as caught:
        find_index(read_yaml(settings).data)
    assert str(caught.value).endswith(f"; {tmp_path / INDEX_NAME} is there, and is read where none is named")


def test_named_index_root_and_their_absence(tmp_path):
    elsewhere = write_index(tmp_path, [STEM]).rename(tmp_path / "mine.csv")
    assert find_index(DataConfig(data_root=tmp_path, index=elsewhere)) == elsewhere
    with pytest.raises(FileNotFoundError, match=r"looked for .*other\.csv"):
        find_index(DataConfig(data_root=tmp_path, index=tmp_path / "other.csv"))
    with pytest.raises(FileNotFoundError, match="data_root"):
        find_index(DataConfig(data_root=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data_root"):
        find_index(DataConfig())


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
