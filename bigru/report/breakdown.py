"""Writes the sections of the document that say how far ahead and at which joint a run's error lies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bigru.report.markdown import blocks, plain, table
from bigru.report.record import NETWORK, RunRecord

COMPARED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def horizon(record: RunRecord, picture: str) -> str:
    """Returns the error by how far ahead a frame is: picture, some of its figures, where a baseline is as good."""
    predicted = record.config["data"]["predicted"]
    frames = sorted({max(1, math.ceil(share * predicted)) for share in COMPARED_SHARES})
    rows = [
        [plain(name), *(f"{errors[frame - 1]:,.1f}" for frame in frames)] for name, errors in record.horizon.items()
    ]
    reach = ", ".join(f"{predicted / fps:.2f} s ahead at {fps:g} fps" for fps, _ in record.by_frame_rate)
    return blocks(
        f"The per-joint error in pixels at each predicted frame; frame {predicted} is {reach}.",
        f"![Error against horizon]({picture})",
        table(["Forecast", *(f"frame {frame}" for frame in frames)], rows, left=1),
        *filter(None, [unbeaten(record.horizon)]),
    )


def unbeaten(horizon: Mapping[str, np.ndarray]) -> str:
    """Returns sentences that name the frames in which a baseline is at least as good; empty if there are none."""
    ours = horizon[NETWORK]
    sentences = []
    for name, errors in horizon.items():
        frames = np.flatnonzero(ours >= errors) + 1
        if name != NETWORK and frames.size:
            first = beaten_from(ours, errors)
            rest = " and is beaten at the others" if frames.size < len(ours) else ""
            after = f" and is beaten from frame {first} on" if first else rest
            sentences.append(f'"{plain(name)}" is at least as good as {NETWORK} at {_ranges(frames.tolist())}{after}.')
    return " ".join(sentences)


def beaten_from(ours: np.ndarray, theirs: np.ndarray) -> int | None:
    """Returns the frame, from 1, from which on our errors are smaller, and before which none is; None without one."""
    winning = ours < theirs
    first = int(np.argmax(winning))
    return first + 1 if winning[first:].all() and winning.any() else None


def _ranges(frames: list[int]) -> str:
    """Returns such as `frame 3` or `frames 1 to 4, 7 and 9 to 12`."""
    starts = [frame for frame in frames if frame - 1 not in frames]
    ends = [frame for frame in frames if frame + 1 not in frames]
    parts = [f"{start} to {end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True)]
    several = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"frame{'s' if len(frames) > 1 else ''} {several}"


def joints(picture: str) -> str:
    """Returns the error of each joint, on a picture of both hands."""
    return blocks(
        "The mean over all predicted frames, in pixels; hands as seen from their backs.",
        f"![Error per joint]({picture})",
    )
