"""The index of clips: as programs write it, rows that cannot be used, too large, missing, and where it is found."""

import pytest
from data.dataset import stem_of

from bigru.arguments import read_yaml
from bigru.config import DataConfig
from bigru.data.hdf5 import DataError
from bigru.data.index import COLUMNS, INDEX_NAME, MAX_INDEX_BYTES, IndexedClip, find_index, read_index
from bigru.data.synthetic import write_index

STEM = "p01-CAM_AV-BIAH_RB-BHO-0.0007253558395636801_1.4222339664428545"
LATE_STEM = "p29-CAM_AV-TOWER_MS-RPP-0_3.5"


def row_of(stem):
    participant, camera, task, subtask, times = stem.split("-")
    return (participant, camera, task, subtask, *times.split("_"), f"{stem}.mp4")


ROW = row_of(STEM)


@pytest.fixture
def path(tmp_path):
    return tmp_path / INDEX_NAME


def write_rows(path, *rows):
    path.write_bytes(b"\n".join("\t".join(row).encode() for row in (COLUMNS, *rows)) + b"\n")
    return path


def test_rows_in_order_and_times_as_text(tmp_path):
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
def test_index_as_programs_write_it(path, header, row, written):
    path.write_bytes(written.format("\t".join(header), "\t".join(row)).encode())
    index = read_index(path)
    assert (index.clips, index.skipped) == ((IndexedClip(STEM, 1, "BHO"),), ())


def test_other_cameras_are_counted_and_repeated_rows_skipped(path):
    other = row_of(STEM.replace("CAM_AV", "CAM_LL"))
    index = read_index(write_rows(path, ROW, other, row_of(LATE_STEM), ROW))
    assert [clip.stem for clip in index.clips] == [STEM, LATE_STEM]
    assert index.other_cameras == 1
    (skip,) = index.skipped
    assert (skip.stem, skip.reason, skip.detail) == (STEM, "duplicate", "line 5 repeats line 2")


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
def test_unusable_names_are_skipped(path, name):
    row = (*row_of("p01-CAM_AV-BIAH_RB-BHO-0_1")[:6], name)
    index = read_index(write_rows(path, row, row_of(LATE_STEM)))
    assert [clip.stem for clip in index.clips] == [LATE_STEM]
    assert [skip.reason for skip in index.skipped] == ["bad name"]


@pytest.mark.parametrize(
    "stem",
    ["p\u0660\u0661-CAM_AV-BIAH_RB-BHO-0_1", "p01-CAM_AV-BIAH_RB-BHO-0_" + "1" * 1_000_000],
    ids=["digits of another script", "a million digits"],
)
def test_names_that_only_look_right(path, stem):
    (skip,) = read_index(write_rows(path, row_of(stem))).skipped
    assert skip.reason == "bad name"
    assert len(skip.stem + skip.detail) < 500


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
        pytest.param(b"x" * 5_000_000, 1, "no column participant", id="giant-header"),
        pytest.param("\t".join(COLUMNS).encode() + b"\n" + b"x" * 5_000_000, 2, "1 columns, not 7", id="giant-row"),
    ],
)
def test_bad_index_names_file_line_and_expectation(path, content, line, words):
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected tab-separated columns participant camera task") as caught:
        read_index(path)
    assert isinstance(caught.value, ValueError)
    assert f"index {path}, line {line}: " in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_index_too_large_to_be_one(path):
    with path.open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(DataError, match=r"index .*\.csv: 67,108,865 bytes, at most 67,108,864 are read"):
        read_index(path)


def test_index_in_the_root_then_beside_it_or_the_one_named_then_an_error_naming_the_places(tmp_path):
    root, named = tmp_path / "clips", tmp_path / "mine.csv"
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
    with pytest.raises(FileNotFoundError, match=r"looked for .*mine\.csv"):
        find_index(DataConfig(data_root=root, index=named))
    (tmp_path / INDEX_NAME).rename(named)
    assert find_index(DataConfig(data_root=root, index=named)) == named
    with pytest.raises(FileNotFoundError, match="data_root"):
        find_index(DataConfig(data_root=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data_root"):
        find_index(DataConfig())


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
    write_index(tmp_path, [stem_of(1)])
    settings = tmp_path / "reference.yaml"
    settings.write_text(f"data: {{csv_path: gone.csv, h5_dir: {tmp_path}}}")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv, as index says \(in a reference.*: csv_path\)") as caught:
        find_index(read_yaml(settings).data)
    assert str(caught.value).endswith(f"; {tmp_path / INDEX_NAME} is there, and is read where none is named")
