"""The file of frames: mapped where it is of this very dataset and whole, made again where it is not."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from data.dataset import clip_arrays, config_for, stem_of, write_dataset

from bigru.config import DataConfig
from bigru.data.cache import ABANDONED_S, SETTINGS
from bigru.data.hdf5 import ClipError
from bigru.data.synthetic import write_clip, write_index
from bigru.data.windows import load_dataset

SPLITS = ("train", "val", "test")
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs limits and fork")
ALL = {"gaze": True, "objects": True, "surrogate": True}
STEMS = [stem_of(1), stem_of(2), stem_of(49), stem_of(60)]
MISSING = stem_of(3)


@pytest.fixture
def root(tmp_path):
    """Four clips, the second too short, and a fifth that is not there."""
    clips = {stem: clip_arrays(frames, seed=frames) for stem, frames in zip(STEMS, (9, 7, 11, 20), strict=True)}
    clips[MISSING] = None
    clips[STEMS[0]]["left_landmarks"][3] = 0
    write_dataset(tmp_path / "clips", clips)
    return tmp_path / "clips"


def cache_of(root):
    (path,) = root.glob("*.cache")
    return path


def assert_same(one, other):
    for split in SPLITS:
        for item in dataclasses.fields(getattr(one, split)):
            mine, theirs = (getattr(getattr(dataset, split), item.name) for dataset in (one, other))
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, item.name
    for name in ("skipped", "clips", "listed", "digest"):
        assert getattr(one, name) == getattr(other, name), name


@contextlib.contextmanager
def unreadable(*paths):
    """Clips that nobody can read, though neither their size nor their time tells so."""
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    for path, (content, changed) in kept.items():
        path.write_bytes(bytes(len(content)))
        os.utime(path, ns=(changed, changed))
    yield
    for path, (content, changed) in kept.items():
        path.write_bytes(content)
        os.utime(path, ns=(changed, changed))


@pytest.mark.parametrize(
    "changes",
    [
        *({name: True} for name in ALL),
        *(ALL, {"centre": "last"}, {"resample": 100.0}, {"observed": 3, "predicted": 3}, {"split": "time"}),
    ],
    ids=str,
)
def test_other_settings_have_a_file_of_their_own_which_the_next_run_maps(root, changes):
    config = config_for(root, observed=2, predicted=2)
    load_dataset(config)
    before = cache_of(root)
    other = dataclasses.replace(config, **changes)
    first = load_dataset(other)
    (path,) = {*root.glob("*.cache")} - {before}
    assert f"frames written to {path}" in first.describe()
    with unreadable(*root.rglob("*.h5")):
        second = load_dataset(other)
    assert f"frames mapped from {path}" in second.describe()
    assert_same(first, second)
    assert_same(first, load_dataset(dataclasses.replace(other, no_cache=True)))
    assert second.train.present.dtype == torch.bool


def test_tensors_over_the_file_can_be_written_to_and_leave_it_alone(root):
    load_dataset(config_for(root))
    before = cache_of(root).read_bytes()
    load_dataset(config_for(root)).train.frames.zero_()
    assert cache_of(root).read_bytes() == before


def test_stride_is_cut_from_the_same_file(root):
    load_dataset(config_for(root, stride=3))
    with unreadable(*root.rglob("*.h5")):
        dense = load_dataset(config_for(root, stride=1))
    assert_same(dense, load_dataset(config_for(root, stride=1, no_cache=True)))


def test_every_setting_is_either_stored_or_known_to_change_nothing_stored():
    free = {"data_root", "index", "stride", "mask_missing", "strict", "cache", "no_cache"}
    assert {item.name for item in dataclasses.fields(DataConfig)} == set(SETTINGS) | free


def clip_of(root, number):
    return root / "BHO" / f"{STEMS[number]}.h5"


CHANGES = {
    "rewrite": lambda root: write_clip(clip_of(root, 0), clip_arrays(9, seed=77)),
    "lengthen": lambda root: write_clip(clip_of(root, 1), clip_arrays(8)),
    "touch": lambda root: os.utime(clip_of(root, 3), ns=(0, 1)),
    "move": lambda root: clip_of(root, 0).rename(root / f"{STEMS[0]}.h5"),
    "vanish and appear": lambda root: clip_of(root, 0).rename(root / "BHO" / f"{MISSING}.h5"),
    "reorder": lambda root: write_index(root, [STEMS[3], *STEMS[:3], stem_of(4)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_stale_file_is_made_again(root, change):
    load_dataset(config_for(root))
    change(root)
    again = load_dataset(config_for(root))
    assert "(the one there was stale)" in again.cache
    assert_same(again, load_dataset(config_for(root, no_cache=True)))
    assert "mapped" in load_dataset(config_for(root)).cache


def test_clip_that_could_not_be_read_is_tried_again(root):
    """A disk that fails once leaves neither another size nor another time."""
    write_clip(root / f"{MISSING}.h5", clip_arrays(8))
    with unreadable(clip_of(root, 0)):
        assert load_dataset(config_for(root)).skip_counts() == {"unreadable": 1, "short": 1}
        assert "mapped" in load_dataset(config_for(root)).cache
    again = load_dataset(config_for(root))
    assert again.skip_counts() == {"short": 1}
    assert len(again.train.stems) == 2


def test_strict_is_as_strict_with_a_file_of_frames(root):
    load_dataset(config_for(root))
    with pytest.raises(ClipError, match=f"short: {STEMS[1]}: 7 frames, 8 needed"):
        load_dataset(config_for(root, strict=True))


def damaged(content):
    """What may have become of the file, by name."""
    about = content.rindex(b'{"key"')
    yield "empty", b""
    for size in (1, 100, 128, 200, len(content) // 2, about, about + 9, len(content) - 1):
        yield f"cut at {size}", content[:size]
    yield "longer", content + b"\0"
    yield "end not written", content[:-32] + bytes(32)
    yield "nothing written", bytes(len(content))
    yield "an older version's", b"bigru frames\r\n\x1a\n" + content
    yield "deep", content[:about] + b"[" * 100_000
    for place in (0, 15, 20, 50, about + 1):
        yield f"byte {place} flipped", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_damaged_file_is_made_again(root):
    expected = load_dataset(config_for(root))
    path = cache_of(root)
    content = path.read_bytes()
    for name, bad in damaged(content):
        path.write_bytes(bad)
        again = load_dataset(config_for(root))
        assert "frames written to" in again.cache, name
        assert "(the one there was " in again.cache, name
        assert_same(again, expected)
        assert path.read_bytes() == content, name


def test_digest_is_of_the_content_alone(root, tmp_path):
    """A copy with other times, in another place, read or mapped, has the digest; one of another content has not."""
    digest = load_dataset(config_for(root)).digest
    assert len(digest) == 64
    assert load_dataset(config_for(root)).digest == digest
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.cache"))
    for path in copy.rglob("*.h5"):
        os.utime(path, (0, 0))
    (copy / "BHO" / f"{STEMS[3]}.h5").rename(copy / f"{STEMS[3]}.h5")
    assert load_dataset(config_for(copy, stride=1)).digest == digest
    assert load_dataset(config_for(copy, gaze=True)).digest != digest
    # Another frame rate alone.
    write_clip(copy / f"{STEMS[3]}.h5", clip_arrays(20, seed=20) | {"timestamps": [n / 30 for n in range(20)]})
    assert load_dataset(config_for(copy)).digest != digest


def test_folder_for_the_file(root, tmp_path):
    config = config_for(root, cache=tmp_path / "new" / "caches")
    load_dataset(config)
    assert list(root.glob("*.cache")) == []
    assert "mapped" in load_dataset(config).cache
    # Another dataset's does not take its place.
    write_dataset(tmp_path / "other", {stem_of(p): clip_arrays(8, seed=p) for p in (1, 49, 60)})
    load_dataset(dataclasses.replace(config, data_root=tmp_path / "other"))
    assert "mapped" in load_dataset(config).cache
    assert len(list((tmp_path / "new" / "caches").iterdir())) == 2


def test_no_cache_leaves_nothing_and_looks_at_nothing(root):
    load_dataset(config_for(root))
    kept = sorted(root.iterdir())
    with unreadable(root / "BHO" / f"{STEMS[1]}.h5"):
        dataset = load_dataset(config_for(root, no_cache=True))
    assert (dataset.cache, dataset.skip_counts()) == ("", {"unreadable": 1, "missing": 1})
    assert sorted(root.iterdir()) == kept


def test_folder_that_cannot_be_written_to_costs_a_line_only(root, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    dataset = load_dataset(config_for(root, cache=tmp_path / "file" / "below"))
    (line,) = [line for line in dataset.describe().splitlines() if "cache" in line]
    assert line.startswith(f"no cache: {tmp_path / 'file' / 'below'}")
    assert line.endswith("--cache DIR puts it elsewhere, --no-cache does without")
    assert_same(dataset, load_dataset(config_for(root, no_cache=True)))


@contextlib.contextmanager
def files_of_at_most(size):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@POSIX
def test_failed_write_leaves_nothing_behind(root):
    with files_of_at_most(5000):
        dataset = load_dataset(config_for(root))
    assert dataset.cache.startswith(f"no cache: {root}")
    assert "File too large" in dataset.cache
    assert [path.name for path in root.iterdir() if path.is_file()] == ["subtasks_byTask_time.csv"]


def load_and_be_killed(root, after_bytes):
    """Loads in a process of its own that dies, as by kill -9, when so much of the file of frames has been written."""
    with warnings.catch_warnings():
        # Other threads do not live on in the child, which needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            # Whose default is to end the process, without a word to Python.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            with files_of_at_most(after_bytes):
                load_dataset(config_for(root))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ


def test_runs_at_once_leave_one_whole_file(root):
    with ThreadPoolExecutor(4) as pool:
        datasets = [*pool.map(load_dataset, [config_for(root)] * 8)]
    assert len([path for path in root.iterdir() if path.is_file()]) == 2  # It and the index.
    assert "mapped" in load_dataset(config_for(root)).cache
    for dataset in datasets:
        assert_same(dataset, datasets[0])


@POSIX
@pytest.mark.parametrize("after_bytes", [0, 60, 500, 3000, 9000, None], ids=str)
def test_killed_while_writing(root, after_bytes):
    """None: killed when the file is whole but has no name yet."""
    if after_bytes is None:
        load_dataset(config_for(root))
        whole = cache_of(root)
        whole.rename(root / f".{whole.name}.0123.partial")
    else:
        load_and_be_killed(root, after_bytes)
    assert list(root.glob("*.cache")) == []
    (part,) = root.glob(".*.partial")
    dataset = load_dataset(config_for(root))
    assert "frames written to" in dataset.cache
    assert_same(load_dataset(config_for(root)), load_dataset(config_for(root, no_cache=True)))
    # Swept away once it cannot belong to a run that is still writing.
    assert part.exists()
    long_ago = time.time() - 2 * ABANDONED_S
    os.utime(part, (long_ago, long_ago))
    cache_of(root).unlink()
    load_dataset(config_for(root))
    assert not part.exists()


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="needs /proc")
def test_frames_are_views_of_the_mapped_file(root):
    load_dataset(config_for(root))
    dataset = load_dataset(config_for(root))
    file = str(cache_of(root).resolve())
    lines = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    maps = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for split in SPLITS:
        frames = getattr(dataset, split).frames
        assert any(start <= frames.data_ptr() < stop for start, stop in maps), split
