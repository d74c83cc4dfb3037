"""The layout of what is observed and forecast: the image, the joints of two hands, and what may be fed beside them."""

from __future__ import annotations

import math

IMAGE_PX = (1728.0, 972.0)
"""Width and height of the image."""
JOINTS_PER_HAND = 21
"""MediaPipe's landmarks of a hand; number 0 is the wrist."""
JOINTS = 2 * JOINTS_PER_HAND
"""Of both hands, the left one first."""
POSE_SIZE = 2 * JOINTS
"""Coordinates of a frame: x, y of each joint."""
CENTRED_UNIT = 0.5
"""One unit of a centred coordinate, as a fraction of the image's width or height."""
UNIT_PX = (CENTRED_UNIT * IMAGE_PX[0], CENTRED_UNIT * IMAGE_PX[1])
"""One unit of a centred coordinate in pixels, along x and along y."""
MODALITY_SHAPES = {"gaze": (2,), "objects": (30, 4), "surrogate": (2, 4)}
"""Shape of one frame of what may be fed beside the hands, in the order of the features."""
MODALITY_SIZES = {name: math.prod(shape) for name, shape in MODALITY_SHAPES.items()}
"""Features per frame of each modality: 2, 120 and 8."""
ORIGINS = {"frame": "wrists_midpoint_of_this_frame", "last": "image_corner"}
"""What forecast positions count from, by the configuration's `centre`."""
