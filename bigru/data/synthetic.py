"""Synthetic clips in the layout of the real ones: `python -m bigru.data.synthetic DIR --clips N --seed S`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from bigru.command import CommandError, ending
from bigru.data.clips import published_frame_rate
from bigru.data.frames import SPLITS
from bigru.data.index import CAMERA, COLUMNS, INDEX_NAME, SUBTASKS, read_index
from bigru.files import replacing, user_path, write_lines
from bigru.layout import IMAGE_PX

FORMAT = 1
"""Raised whenever the same seed would give other arrays."""
MARKER_NAME = "synthetic.json"


EMBEDDED = {"clips": 470, "seed": 42}
"""The dataset that a run without a data root writes for itself: seconds to write, minutes to learn."""

PARTICIPANTS = tuple(number for number in range(1, 71) if number != 16)
"""The published participants; number 16 is not among them."""
CLIP_SHARES = {"train": 0.78, "val": 0.11, "test": 0.11}
"""Share of the clips per split. The published 0.65, 0.18 and 0.17 would leave a small dataset, most of whose train
clips are short, with hardly more windows to learn from than to be judged by."""
TASKS = (
    *("BIAH_BS", "BIAH_BV", "BIAH_RB", "BRIDGE_AS", "BRIDGE_BV"),
    *("STAIRWAY_AP", "STAIRWAY_MS", "TOWER_HO", "TOWER_MS"),
)

# Clip lengths are lognormal, with a median per frame rate and one spread. Least squares over what is published of
# them: half of all clips have at most 82 frames, 75 % at most 124, 95 % at most 232, and 120 or more have 20 % of
# the train clips, of which 60 % run at 23 fps, and 38 % of the others, which all run at 59 fps.
MEDIAN_FRAMES = {23.0: 60, 59.0: 103}
SPREAD = 0.56
SHORTEST, LONGEST = 2, 1591
# Three windows at the published lengths, so that even the smallest dataset has windows in every split.
LONG_ENOUGH = 150

ASPECT = IMAGE_PX[0] / IMAGE_PX[1]
# Per finger, thumb to little finger: knuckle x and y, direction (radians from the palm's axis), and three bones,
# all in lengths of a hand, of a right hand seen from its back with the fingers along +y.
FINGERS = (
    (0.22, 0.18, 0.75, (0.22, 0.18, 0.14)),
    (0.16, 0.53, 0.12, (0.23, 0.14, 0.11)),
    (0.03, 0.55, 0.00, (0.26, 0.16, 0.12)),
    (-0.10, 0.52, -0.10, (0.24, 0.15, 0.12)),
    (-0.21, 0.45, -0.24, (0.18, 0.11, 0.10)),
)


@dataclass(frozen=True)
class PlannedClip:
    """The properties of a clip that are decided before its motion is drawn."""

    number: int
    participant: int
    subtask: str
    stem: str
    frames: int
    fps: float


def plan_clips(clips: int, seed: int) -> list[PlannedClip]:
    """Decides participant, subtask, name and length of every clip.

    Clips are shared out over train, val and test, at least one each, and within a split evenly over its
    participants. Lengths follow the published quantiles; the longest of a split always has 150 frames or more.

    Raises:
        ValueError: `clips` is below 3, or `seed` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if clips < len(SPLITS):
        raise ValueError(f"clips: expected at least {len(SPLITS)}, one per split, got {clips}")
    counts = {split: max(1, round(clips * share)) for split, share in CLIP_SHARES.items()}
    # Train takes what rounding left over.
    counts["train"] += clips - sum(counts.values())
    rng = np.random.default_rng([seed, FORMAT])
    planned: list[PlannedClip] = []
    for split, count in counts.items():
        people = [participant for participant in PARTICIPANTS if participant in SPLITS[split]]
        chosen = [people[i * len(people) // count] for i in range(count)]
        lengths = _clip_lengths(np.array([published_frame_rate(participant) for participant in chosen]), rng)
        for participant, frames in zip(chosen, lengths, strict=True):
            planned.append(_plan_clip(len(planned), participant, int(frames), rng))
    return planned


def _clip_lengths(fps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the lengths, (N,) int64, of clips at `fps` (N,), one from each of N equal slices of the distribution."""
    lengths = np.empty(len(fps), np.int64)
    for rate, median in MEDIAN_FRAMES.items():
        (clips,) = np.nonzero(fps == rate)
        quantiles = (rng.permutation(len(clips)) + rng.uniform(1e-9, 1, len(clips))) / max(1, len(clips))
        spread = [SPREAD * NormalDist().inv_cdf(quantile) for quantile in quantiles]
        lengths[clips] = np.rint(median * np.exp(spread)).clip(SHORTEST, LONGEST)
    longest = lengths.argmax()
    lengths[longest] = max(lengths[longest], LONG_ENOUGH)
    return lengths


def _plan_clip(number: int, participant: int, frames: int, rng: np.random.Generator) -> PlannedClip:
    task, subtask = TASKS[rng.integers(len(TASKS))], SUBTASKS[rng.integers(len(SUBTASKS))]
    fps = published_frame_rate(participant)
    # Names are told apart by their times, which carry all the digits a float has, as the real ones do.
    start = float(rng.uniform(1, 90))
    stem = f"p{participant:02d}-{CAMERA}-{task}-{subtask}-{start!r}_{start + frames / fps!r}"
    return PlannedClip(number, participant, subtask, stem, frames, fps)


def clip_arrays(plan: PlannedClip, seed: int) -> dict[str, np.ndarray]:
    """Draws the datasets of one clip, float32, in the published layout (F frames).

    Both hands reach and return in a rhythm of 1.3 to 1.7 s, nearly in opposition, while they turn and the fingers
    close and open in step: with period, phase and extent drawn per clip, the 60 frames seen (2.6 s at 23 fps, 1.0 s
    at 59 fps) tell the 60 to come, up to landmark noise of about 1.5 pixels and, in a fifth of the clips, a
    hand that is not seen for a while or at all.

    Returns:
        left_landmarks, right_landmarks (F, 21, 3), timestamps (F,), norm_gaze (F, 2), rec_bboxes (F, 30, 4),
        surrogate_hands (F, 2, 4).
    """
    rng = np.random.default_rng([seed, FORMAT, plan.number])
    seconds = np.arange(plan.frames) / plan.fps
    theta = 2 * np.pi * seconds / rng.uniform(1.3, 1.7) + rng.uniform(0, 2 * np.pi)
    right = _hand(theta, np.array([0.38, 0.28]), rng)
    left = _hand(theta + np.pi + rng.normal(0, 0.1), np.array([0.38, 0.28]), rng)
    # A right hand on the image's left is a left hand on its right: the camera looks down, facing them.
    left[..., 0] = 1 - left[..., 0]
    palm = right[:, 9, :2].copy()
    # Gaze runs a fifth of a second ahead of the hand it guides.
    gaze = np.stack([np.interp(seconds + 0.2, seconds, palm[:, axis]) for axis in range(2)], axis=1)
    gaze += rng.normal(0, 0.01, gaze.shape)
    gaze[_missing(plan.frames, rng, whole=0.1, runs=0.3)] = 0
    left[_missing(plan.frames, rng, whole=0.02, runs=0.08)] = 0
    right[_missing(plan.frames, rng, whole=0.02, runs=0.08)] = 0
    arrays = {
        "left_landmarks": left,
        "right_landmarks": right,
        "timestamps": seconds,
        "norm_gaze": gaze,
        "rec_bboxes": _object_boxes(palm, rng),
        "surrogate_hands": _surrogate_boxes(seconds, rng),
    }
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def _hand(theta: np.ndarray, rest: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the landmarks of a right hand, (F, 21, 3), moving with phase `theta` (F,) about `rest` (x, y)."""
    frames = len(theta)
    # A second harmonic makes the way out quicker than the way back.
    reach = np.sin(theta) + 0.25 * np.sin(2 * theta + 0.6)
    heading = rng.normal(0.5, 0.1)
    extent = rng.uniform(0.07, 0.1)
    wrist = rest + rng.normal(0, 0.01, 2) + extent * reach[:, None] * [np.sin(heading) / ASPECT, np.cos(heading)]
    curl = np.clip(0.5 + 0.35 * np.sin(theta + 0.8 - 0.15 * np.arange(5)[:, None]), 0, 1)  # (5, F)
    turn = rng.normal(-0.2, 0.05) + 0.25 * np.sin(theta + 1.2)
    size = rng.uniform(0.17, 0.19)

    joints = np.zeros((frames, 21, 3))
    for finger, (knuckle_x, knuckle_y, direction, bones) in enumerate(FINGERS):
        joint = np.tile([knuckle_x, knuckle_y, 0.0], (frames, 1))
        joints[:, 1 + 4 * finger] = joint
        for bone, length in enumerate(bones):
            # Each bone bends further out of the image plane than the one before, so a fist looks short.
            bend = curl[finger] * 0.7 * (bone + 1)
            flat = length * np.cos(bend)
            joint = joint + np.stack(
                [flat * np.sin(direction), flat * np.cos(direction), -length * np.sin(bend)], axis=1
            )
            joints[:, 2 + 4 * finger + bone] = joint
    x, y = joints[..., 0].copy(), joints[..., 1].copy()
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    joints[..., 0] = size * (cos * x - sin * y) / ASPECT + wrist[:, None, 0]
    joints[..., 1] = size * (sin * x + cos * y) + wrist[:, None, 1]
    joints[..., 2] *= size / ASPECT
    return joints + rng.normal(0, 0.001, joints.shape)


def _missing(frames: int, rng: np.random.Generator, *, whole: float, runs: float) -> np.ndarray:
    """Draws the frames, (F,) bool, in which something is not seen.

    It is missing throughout with probability `whole`, and in one to three runs, each of up to 30 % of the clip, `runs`.
    """
    missing = np.zeros(frames, dtype=bool)
    draw = rng.random()
    if draw < whole:
        missing[:] = True
    elif draw < whole + runs:
        for _ in range(rng.integers(1, 4)):
            start = rng.integers(frames)
            missing[start : start + 1 + int(0.3 * frames * rng.random())] = True
    return missing


def _object_boxes(palm: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws 4 to 12 boxes, (F, 30, 4), zero-padded: the first in the right hand, the others lying on the table."""
    frames, count = len(palm), int(rng.integers(4, 13))
    boxes = np.zeros((frames, 30, 4))
    boxes[:, :count, :2] = rng.uniform([0.25, 0.4], [0.75, 0.75], (count, 2))
    boxes[:, :count, 2:] = rng.uniform(0.02, 0.06, (count, 2))
    boxes[:, 0, :2] = palm
    boxes[:, :count] += rng.normal(0, 0.0005, (frames, count, 4))
    return boxes


def _surrogate_boxes(seconds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws the surrogate's two hands, (F, 2, 4), moving slowly on the far side; in a third of clips one is gone."""
    boxes = np.zeros((len(seconds), 2, 4))
    for hand, x in enumerate((0.4, 0.6)):
        phase = 2 * np.pi * seconds / rng.uniform(3, 6) + rng.uniform(0, 2 * np.pi)
        boxes[:, hand] = [x, 0.85, *rng.uniform(0.06, 0.1, 2)]
        boxes[:, hand, 0] += 0.04 * np.sin(phase)
        boxes[:, hand, 1] += 0.08 * np.cos(phase)
    if rng.random() < 1 / 3:
        boxes[:, rng.integers(2)] = 0
    return boxes


def write_clip(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one clip's datasets; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values)


def write_index(root: Path, stems: Sequence[str]) -> Path:
    """Writes the index of the named clips into `root` and returns its path; it appears whole or not at all."""
    lines = ["\t".join(COLUMNS)]
    for stem in stems:
        participant, camera, task, subtask, times = stem.split("-")
        lines.append("\t".join([participant, camera, task, subtask, *times.split("_"), f"{stem}.mp4"]))
    path = root / INDEX_NAME
    write_lines(path, lines)
    return path


def write_synthetic(root: Path, clips: int, seed: int, *, overwrite: bool = False) -> Path:
    """Writes a synthetic dataset: `{root}/{subtask}/{stem}.h5`, a marker, and last the index.

    A folder without an index is therefore incomplete. The same arguments give the same bytes in every array.

    Args:
        root: folder to write; made if need be.
        clips: number of clips, at least 3.
        seed: source of chance, 0 or more.
        overwrite: replace a complete dataset that this function wrote.

    Returns:
        `root`.

    Raises:
        ValueError: as `plan_clips`.
        FileExistsError: `root` holds a complete dataset and `overwrite` is off, or holds other files.
    """
    planned = plan_clips(clips, seed)
    _clear(root, overwrite)
    # First, so that an interrupted write is known as ours and can be taken up again.
    write_lines(root / MARKER_NAME, [json.dumps(_marker(clips, seed))])
    for plan in tqdm(planned, desc="writing", unit="clip", disable=None):
        write_clip(root / plan.subtask / f"{plan.stem}.h5", clip_arrays(plan, seed))
    write_index(root, [plan.stem for plan in planned])
    return root


def _marker(clips: int, seed: int) -> dict[str, Any]:
    return {"format": FORMAT, "clips": clips, "seed": seed, "participants": list(PARTICIPANTS)}


def _clear(root: Path, overwrite: bool) -> None:
    """Makes `root` ready for writing: removes the clips that its index names, and nothing that is not ours."""
    root.mkdir(parents=True, exist_ok=True)
    index = root / INDEX_NAME
    if any(root.iterdir()) and not (root / MARKER_NAME).is_file():
        raise FileExistsError(f"{root} holds files that were not generated here; choose another folder")
    if not index.is_file():
        return
    if not overwrite:
        raise FileExistsError(f"{root} holds a complete synthetic dataset; --overwrite replaces it")
    old = read_index(index)
    # The index goes first: from here until the new one is written the folder is incomplete.
    index.unlink()
    for clip in old.clips:
        (root / clip.subtask / f"{clip.stem}.h5").unlink(missing_ok=True)


def ensure_synthetic(root: Path, clips: int, seed: int) -> Path:
    """Returns `root` holding the synthetic dataset of `clips` and `seed`, written only if it is not there yet.

    Raises:
        ValueError, FileExistsError: as `write_synthetic`.
    """
    try:
        marker = json.loads((root / MARKER_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        marker = None
    if marker == _marker(clips, seed) and (root / INDEX_NAME).is_file():
        return root
    return write_synthetic(root, clips, seed, overwrite=True)


@ending("data.synthetic")
def main(arguments: Sequence[str]) -> int:
    """Writes a synthetic dataset and says what was written."""
    parser = argparse.ArgumentParser(prog="python -m bigru.data.synthetic", description=__doc__.partition(":")[0])
    parser.add_argument("dir", type=user_path, help="folder to write")
    parser.add_argument("--clips", type=int, default=EMBEDDED["clips"], help="number of clips (%(default)s)")
    parser.add_argument("--seed", type=int, default=EMBEDDED["seed"], help="source of chance (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that was generated before")
    given = parser.parse_args(arguments)
    try:
        write_synthetic(given.dir, given.clips, given.seed, overwrite=given.overwrite)
    except ValueError as error:
        raise CommandError(str(error)) from error
    planned = plan_clips(given.clips, given.seed)
    people = len({plan.participant for plan in planned})
    frames = sum(plan.frames for plan in planned)
    print(f"{len(planned):,} clips of {people} participants, {frames:,} frames, in {given.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
