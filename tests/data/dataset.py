"""A small dataset with known numbers, for the tests."""

import dataclasses

import numpy as np
import pytest

from bigru.config import DataConfig
from bigru.data.clips import read_clip
from bigru.data.hdf5 import ClipError
from bigru.data.synthetic import write_clip, write_index

CONFIG = DataConfig(observed=4, predicted=4, stride=3)


def stem_of(participant, number=0):
    return f"p{participant:02d}-CAM_AV-BIAH_RB-BHO-{number}_3.5"


def clip_arrays(frames, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "left_landmarks": (21, 3),
        "right_landmarks": (21, 3),
        "norm_gaze": (2,),
        "rec_bboxes": (30, 4),
        "surrogate_hands": (2, 4),
    }
    return {name: rng.uniform(0.1, 0.9, (frames, *shape)).astype(np.float32) for name, shape in shapes.items()}


def refusal(path, config):
    """Why a clip is refused: the reason and the detail."""
    with pytest.raises(ClipError) as caught:
        read_clip(path, config)
    assert str(caught.value) == f"{caught.value.reason}: {caught.value.detail}"
    return caught.value.reason, caught.value.detail


def write_dataset(root, clips):
    """Write {stem: arrays} and their index; arrays of None leave the clip out of the folder."""
    for stem, arrays in clips.items():
        if arrays is not None:
            write_clip(root / stem.split("-")[3] / f"{stem}.h5", arrays)
    write_index(root, list(clips))


def config_for(root, **changes):
    return dataclasses.replace(CONFIG, data_root=root, **changes)
