"""Files made to harm or damaged by chance: refused by name, at no cost in memory, whatever their bytes."""

import contextlib
import struct
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest
from data.dataset import clip_arrays, stem_of
from data.dataset import refusal as refusal_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigru.config import DataConfig
from bigru.data.clips import read_clip
from bigru.data.hdf5 import MAX_FRAMES, ClipError, DataError
from bigru.data.index import COLUMNS, read_index
from bigru.data.synthetic import write_clip, write_index

FRAMES = 7
CONFIG = DataConfig(observed=2, predicted=2, gaze=True, objects=True, surrogate=True)
PACKINGS = {
    "gzip": {"compression": "gzip"},
    "shuffle-gzip": {"compression": "gzip", "shuffle": True},
    "chunked": {"chunks": True},
}


def arrays_with_times():
    return clip_arrays(FRAMES) | {"timestamps": np.arange(FRAMES, dtype=np.float32) / 23}


def refusal(path):
    return refusal_of(path, CONFIG)


@pytest.fixture
def path(tmp_path):
    return tmp_path / f"{stem_of(1)}.h5"


@pytest.fixture
def little_memory():
    """Fails a test that ever holds more than 40 MB."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("chunks", [True, 3])
def test_packed_clips_read_as_libhdf5_reads_them(path, packing, chunks):
    """Chunks of 3 frames reach beyond the end of 7."""
    arrays = arrays_with_times()
    arrays["rec_bboxes"] = arrays["rec_bboxes"].astype(">f8")
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            shape = True if chunks is True else (chunks, *(max(1, size - 1) for size in values.shape[1:]))
            file.create_dataset(name, data=values, **packing | {"chunks": shape})
    clip = read_clip(path, CONFIG)
    np.testing.assert_array_equal(clip.hands[:, 1], arrays["right_landmarks"])
    np.testing.assert_array_equal(clip.gaze, arrays["norm_gaze"])
    np.testing.assert_array_equal(clip.objects, arrays["rec_bboxes"].astype(np.float32))
    np.testing.assert_array_equal(clip.seconds, arrays["timestamps"].astype(np.float64))


@pytest.mark.parametrize(("fill", "expected"), [(None, 0), (0.25, 0.25)])
def test_chunks_that_were_never_written_hold_the_fill_value(path, fill, expected):
    arrays = arrays_with_times()
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            packing = {"chunks": (2, *values.shape[1:]), "compression": "gzip", "fillvalue": fill}
            file.create_dataset(name, values.shape, "f4", **packing)[4:] = values[4:]
    gaze = read_clip(path, CONFIG).gaze
    np.testing.assert_array_equal(gaze[:4], expected)
    np.testing.assert_array_equal(gaze[4:], arrays["norm_gaze"][4:])


@contextlib.contextmanager
def without_gaze(path):
    """A clip that lacks its gaze, to be written into."""
    arrays = arrays_with_times()
    del arrays["norm_gaze"]
    write_clip(path, arrays)
    with h5py.File(path, "a") as file:
        yield file


def write_with_chunk(path, content, shape=(FRAMES, 2), chunks=(FRAMES, 2), **packing):
    """A clip whose gaze is one chunk of these bytes."""
    with without_gaze(path) as file:
        gaze = file.create_dataset("norm_gaze", shape, "f4", chunks=chunks, **packing)
        if content is not None:
            gaze.id.write_direct_chunk((0,) * len(shape), content)


def zeros_packed(size):
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()


@pytest.mark.usefixtures("little_memory")
def test_chunk_that_unpacks_to_far_more_than_it_declares(path):
    """50 MB in a 50 KB chunk that declares 56 bytes; and 1 MB in one that is small enough to be looked into."""
    write_with_chunk(path, zeros_packed(50 * 2**20), compression="gzip")
    assert refusal(path)[0] == "unreadable"
    write_with_chunk(path, zeros_packed(2**20), compression="gzip")
    assert refusal(path) == ("unreadable", "norm_gaze has a chunk of 57 bytes, expected 56")


@pytest.mark.parametrize(
    "content", [b"x", zlib.compress(bytes(55)), zlib.compress(bytes(56))[:-6], bytes(56)], ids=repr
)
def test_chunk_that_unpacks_to_less_or_not_at_all(path, content):
    write_with_chunk(path, content, compression="gzip")
    assert refusal(path)[0] == "unreadable"


@pytest.mark.parametrize("size", [0, 1, 2**31])
def test_chunk_whose_size_is_not_what_was_stored(path, size):
    """libhdf5 reads beyond its memory where the filters meet a chunk of no bytes."""
    content = zlib.compress(np.random.default_rng(0).bytes(56))
    write_with_chunk(path, content, compression="gzip")
    stored = struct.pack("<II", len(content), 0)
    whole = path.read_bytes()
    assert whole.count(stored) == 1
    path.write_bytes(whole.replace(stored, struct.pack("<II", size, 0)))
    assert refusal(path)[0] == "unreadable"


@pytest.mark.usefixtures("little_memory")
def test_declared_frames_that_take_no_room_in_the_file(path):
    """Chunks that are never written: the file is small, its reading would not be."""
    with h5py.File(path, "w") as file:
        for name, values in arrays_with_times().items():
            file.create_dataset(name, (MAX_FRAMES + 1, *values.shape[1:]), "f4", chunks=True, compression="gzip")
    assert path.stat().st_size < 100_000
    assert refusal(path) == ("too long", "left_landmarks declares 100,001 frames, at most 100,000 are read")


@pytest.mark.usefixtures("little_memory")
def test_chunk_declared_at_gigabytes(path):
    write_with_chunk(path, None, (FRAMES, 2), (2**27, 2), maxshape=(None, 2), compression="gzip")
    assert refusal(path) == ("packed", "norm_gaze has chunks of 1,073,741,824 bytes, at most 67,108,864 are read")


@pytest.mark.parametrize(
    "packing", [{"compression": "lzf"}, {"fletcher32": True}, {"scaleoffset": 3}, {"shuffle": True}], ids=str
)
def test_other_filters_are_refused(path, packing):
    with h5py.File(path, "w") as file:
        for name, values in arrays_with_times().items():
            file.create_dataset(name, data=values, **packing)
    reason, detail = refusal(path)
    assert reason == "packed"
    assert detail.endswith("expected gzip, shuffle and gzip, or none")


def test_gzip_twice_over_is_refused(path):
    with without_gaze(path) as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((FRAMES, 2))
        plan.set_deflate(9)
        plan.set_filter(h5py.h5z.FILTER_DEFLATE, 0, (9,))
        h5py.h5d.create(file.id, b"norm_gaze", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((FRAMES, 2)), plan)
    reason, detail = refusal(path)
    assert reason == "packed"
    assert detail.startswith("norm_gaze is packed by filters [1, 1], ")


def test_floating_point_type_of_no_machine_is_refused(path):
    odd = h5py.h5t.IEEE_F32LE.copy()
    odd.set_fields(31, 24, 7, 0, 24)
    odd.set_ebias(63)
    with without_gaze(path) as file:
        h5py.h5d.create(file.id, b"norm_gaze", odd, h5py.h5s.create_simple((FRAMES, 2)))
    assert refusal(path)[0] == "wrong dtype"


# Fuzzing: always the same examples, so that a failure is seen by everyone.
BOUNDED = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEVERAL = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12)


def mutated(content, changes, keep):
    """`content` with some bytes set, each at its share of the length, and cut off."""
    changed = bytearray(content)
    for where, value in changes:
        changed[int(where * len(content))] = value
    return bytes(changed[: int(keep * len(content))])


@pytest.fixture(scope="module", params=["plain", "packed", "newest"])
def sound(request, tmp_path_factory):
    """The bytes of a sound clip as h5py writes it, packed, or in the newest layout of the format."""
    path = tmp_path_factory.mktemp("sound") / "clip.h5"
    with h5py.File(path, "w", libver="latest" if request.param == "newest" else None) as file:
        for name, values in arrays_with_times().items():
            file.create_dataset(name, data=values, **{} if request.param == "plain" else PACKINGS["shuffle-gzip"])
    return path.read_bytes()


@BOUNDED
@given(changes=SEVERAL, keep=st.sampled_from([1.0, 1.0, 1.0, 0.999, 0.9, 0.5]))
def test_clip_with_any_bytes_changed_is_read_or_refused(sound, path, changes, keep):
    path.write_bytes(mutated(sound, changes, keep))
    try:
        clip = read_clip(path, CONFIG)
    except ClipError:
        return
    assert len(clip.hands) <= MAX_FRAMES
    assert all(np.isfinite(values).all() for values in (clip.hands, clip.gaze, clip.objects, clip.surrogate))
    assert (np.diff(clip.seconds) >= 0).all()


@BOUNDED
@given(content=st.binary(max_size=3000))
def test_any_bytes_for_a_clip(path, content):
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + content)
    with pytest.raises(ClipError):
        read_clip(path, CONFIG)


@BOUNDED
@given(changes=SEVERAL, keep=st.floats(0, 1))
def test_index_with_any_bytes_changed_is_read_or_refused(tmp_path, changes, keep):
    path = write_index(tmp_path, [stem_of(p) for p in (1, 2, 29, 49, 60, 70)])
    path.write_bytes(mutated(path.read_bytes(), changes, keep))
    try:
        index = read_index(path)
    except DataError:
        return
    for clip in index.clips:
        # Nothing in it leads out of the folder of clips.
        assert "/" not in clip.stem + clip.subtask
        assert "\\" not in clip.stem + clip.subtask
        assert ".." not in clip.stem + clip.subtask
    assert all(len(skip.detail) < 300 for skip in index.skipped)


@BOUNDED
@given(
    rows=st.lists(st.lists(st.text(max_size=12) | st.sampled_from([stem_of(1), "p01", "CAM_AV", "../x"]), max_size=9)),
    header=st.sampled_from(["\t".join(COLUMNS), ""]),
)
def test_any_text_for_an_index(tmp_path, rows, header):
    path = tmp_path / "index.csv"
    text = "\n".join([header, *("\t".join(row) for row in rows)])
    path.write_bytes(text.encode(errors="replace"))
    with contextlib.suppress(DataError):
        read_index(path)
