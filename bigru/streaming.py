"""Forecasts frame by frame, for a robot's loop: each new frame gives a forecast made of the last T frames."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bigru.config import DataConfig
from bigru.data.clips import Clip, read_clip
from bigru.data.windows import frame_features, hands_origin
from bigru.files import printable, write_npz
from bigru.layout import CENTRED_UNIT, JOINTS_PER_HAND, MODALITY_SHAPES, ORIGINS, POSE_SIZE
from bigru.model.forecaster import HandForecaster
from bigru.model.load import load_model


@dataclass(frozen=True, eq=False)
class StreamedForecast:
    """The forecast made when a frame arrived."""

    frame: int
    """Number of the last observed frame, from 0."""
    positions: NDArray[np.float32]
    """(T, 2, 21, 2): the T frames that follow; left and right hand, joint, x and y as fractions of the image's width
    and height, relative to the midpoint of the wrists of that very frame, or, with `centre="last"`, in the image."""
    latency_s: float
    """Seconds from the frame's arrival to its forecast."""


def replay(model: HandForecaster, clip: Path, config: DataConfig, fps: float | None = None) -> list[StreamedForecast]:
    """Feeds a clip to a stream frame by frame, as fast as it takes them.

    Args:
        model: the network.
        clip: the .h5 file.
        config: how the network's clips were read.
        fps: frames per second of a clip whose timestamps tell none.

    Returns:
        The forecast of every frame from number T - 1 on.

    Raises:
        ClipError: the clip cannot be read, or has fewer than T frames.
    """
    content, stream = read_clip(clip, config, config.observed, fps), ForecastStream(model, config)
    others = {name: getattr(content, name) for name in MODALITY_SHAPES if getattr(config, name)}
    forecasts = [
        stream.push(hands[:, :, :2], **{name: values[number] for name, values in others.items()})
        for number, hands in enumerate(content.hands)
    ]
    return [forecast for forecast in forecasts if forecast is not None]


def write_stream(model: HandForecaster, config: DataConfig, clip: Path, out: Path, fps: float | None = None) -> str:
    """Forecasts after every frame of a clip and writes CLIP.stream.npz; returns lines about the latency and the file.

    The file holds predicted (N, T, 2, 21, 2) as in CLIP.npz, frame (N,), the last frame that each forecast has seen,
    latency_s (N,), and origin.
    """
    forecasts = replay(model, clip, config, fps)
    latency_s = np.array([forecast.latency_s for forecast in forecasts])
    device, threads = next(model.parameters()).device, torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)} of the CPU" if device.type == "cpu" else str(device)
    median, slow = 1e3 * np.percentile(latency_s, (50, 99))
    path = out / f"{clip.stem}.stream.npz"
    out.mkdir(parents=True, exist_ok=True)
    predicted = np.stack([forecast.positions for forecast in forecasts])
    frames = [forecast.frame for forecast in forecasts]
    arrays = {"predicted": predicted, "frame": frames, "latency_s": latency_s, "origin": ORIGINS[config.centre]}
    write_npz(path, arrays)
    return (
        f"{printable(clip.stem)}: {len(forecasts)} forecasts of {config.predicted} frames on {where}, "
        f"latency median {median:.2f} ms, 99th percentile {slow:.2f} ms\n  {printable(path)}"
    )


class ForecastStream:
    """Takes frames one at a time and returns a forecast for each once T of them have been seen.

    The encoder reads its window in both directions, so every frame costs one whole pass over the last T frames.
    Frames must come at the rate of the clips the network was trained on (`config.resample`, if that is set).

    Args:
        model: the network, on the device that is to compute. It is put into evaluation mode.
        config: how the network's clips were read: T (`observed`), the modalities and the centring. Default: the
            published protocol.

    Attributes:
        frames: frames seen so far.

    Raises:
        ValueError: if `config` has other modalities than the network's input.

    Example:
        >>> stream = ForecastStream.load("runs/20261123_224500")
        >>> for hands in camera:  # (2, 21, 2) each, a missing hand all zeros
        ...     forecast = stream.push(hands)
    """

    def __init__(self, model: HandForecaster, config: DataConfig | None = None) -> None:
        self.config = DataConfig() if config is None else config
        expected = model.encoder.core.input_size
        if self.config.input_size != expected:
            raise ValueError(f"config: expected modalities of {expected} features, got {self.config.input_size}")
        self.model = model.eval()
        self.frames = 0
        self._device = next(model.parameters()).device
        # Every frame is written twice, T rows apart, so that the last T frames always lie in one piece.
        self._features = torch.zeros(2 * self.config.observed, expected)
        self._rows: NDArray[np.float32] = self._features.numpy()
        self._present = torch.zeros(1, 2, dtype=torch.bool)

    @classmethod
    def load(cls, weights: str | Path, *, device: str = "cpu", backend: str = "auto") -> ForecastStream:
        """Reads the weights and, from the config.json beside them, how their clips were read.

        Args:
            weights: a run's folder or weights.safetensors, or a published state dict (.pt), without a config.json.
            device: where to compute, such as "cpu" or "cuda".
            backend: of the GRU, as for `BiGRU`.

        Raises:
            CheckpointError, ConfigError: for weights or settings that cannot be used.
        """
        return cls(*load_model(weights, device=device, backend=backend))

    def reset(self) -> None:
        """Forgets all frames, for the next person or after a gap."""
        self.frames = 0

    def push(
        self,
        hands: ArrayLike,
        *,
        gaze: ArrayLike | None = None,
        objects: ArrayLike | None = None,
        surrogate: ArrayLike | None = None,
    ) -> StreamedForecast | None:
        """Adds a frame.

        Args:
            hands: (2, 21, 2), or (2, 21, 3) whose third coordinate is not read: left and right hand, MediaPipe's
                joints, x and y as fractions of the image's width and height; a missing hand is all zeros.
            gaze: (2,) image-normalised; zeros where missing. Wanted if and only if the network reads it, as are
            objects: (30, 4) centre x, y, width, height, zero-padded, and
            surrogate: (2, 4), the robot surrogate's hands, coded like `objects`.

        Returns:
            The forecast, or None for the first T - 1 frames.

        Raises:
            ValueError: for other shapes, numbers that are not finite, or a modality too many or too few.
        """
        started = time.perf_counter()
        others = {"gaze": gaze, "objects": objects, "surrogate": surrogate}
        clip = self._checked(hands, others)
        length = self.config.observed
        slot = self.frames % length
        self._rows[slot] = self._rows[slot + length] = frame_features(clip, self.config.centre)[0]
        self._present[0] = torch.from_numpy(clip.present[0])
        self.frames += 1
        if self.frames < length:
            return None
        first = self.frames % length
        window = self._features[first : first + length]
        origin = torch.zeros(1, 2)
        if self.config.centre == "last":
            window = window.clone()
            origin = hands_origin(window[-1:, :POSE_SIZE], self._present)
            window[:, :POSE_SIZE] -= origin.repeat(1, 2 * JOINTS_PER_HAND)
        with torch.inference_mode():
            predicted = self.model(window.unsqueeze(0).to(self._device))[0].cpu()
        positions = CENTRED_UNIT * (predicted.unflatten(-1, (2, JOINTS_PER_HAND, 2)) + origin)
        return StreamedForecast(self.frames - 1, positions.numpy(), time.perf_counter() - started)

    def _checked(self, hands: ArrayLike, others: dict[str, ArrayLike | None]) -> Clip:
        """Returns the frame as a clip of one frame."""
        pose = np.asarray(hands, dtype=np.float32)
        if pose.shape not in ((2, JOINTS_PER_HAND, 2), (2, JOINTS_PER_HAND, 3)):
            raise ValueError(f"hands: expected shape (2, {JOINTS_PER_HAND}, 2), got {pose.shape}")
        arrays = {"hands": pose[:, :, :2]}
        for name, given in others.items():
            wanted = getattr(self.config, name)
            if wanted != (given is not None):
                raise ValueError(f"{name}: the network reads {'one' if wanted else 'none'}, got {type(given).__name__}")
            if given is not None:
                arrays[name] = np.asarray(given, dtype=np.float32)
                if arrays[name].shape != MODALITY_SHAPES[name]:
                    raise ValueError(f"{name}: expected shape {MODALITY_SHAPES[name]}, got {arrays[name].shape}")
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise ValueError(f"{name}: expected finite numbers (a missing hand is all zeros), got {values}")
        frame: dict[str, Any] = {name: arrays[name][None] if name in arrays else None for name in ("hands", *others)}
        return Clip(fps=1.0, seconds=np.zeros(1), **frame)
