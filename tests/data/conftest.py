"""A dataset that several tests read."""

import pytest
from data.dataset import clip_arrays, stem_of, write_dataset


@pytest.fixture
def three_clips(tmp_path):
    """One clip in each split, of 8, 11 and 20 frames: 1, 2 and 5 windows."""
    clips = {stem_of(p): clip_arrays(frames, seed=p) for p, frames in ((48, 8), (49, 11), (60, 20))}
    write_dataset(tmp_path, clips)
    return tmp_path, clips
