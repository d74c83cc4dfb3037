"""A trained network together with the settings that its clips are read under."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from bigru.config import ConfigError, DataConfig, read_settings
from bigru.environment import pick_device
from bigru.model.forecaster import HandForecaster
from bigru.model.weights import modalities_of, weights_file


def load_model(
    weights: str | Path, *, device: str = "auto", backend: str = "auto", observed: int | None = None
) -> tuple[HandForecaster, DataConfig]:
    """Builds the network of a file of weights, ready to forecast, and reads the settings of its clips.

    Args:
        weights: a run's folder or its weights.safetensors, whose settings are in the config.json beside it, or a
            published state dict, whose clips are read as published.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        backend: of the GRU, as for `BiGRU`.
        observed: frames observed, and as many predicted; default: as in the settings, else 60.

    Raises:
        ConfigError: settings, a device or a backend that cannot be used.
        CheckpointError: weights that cannot be used.
    """
    where = pick_device(device)
    weights = weights_file(weights)
    settings = weights.with_name("config.json")
    model = HandForecaster.load(weights, device=str(where), backend=backend)
    config = read_settings(settings).data if settings.is_file() else DataConfig()
    if not settings.is_file():
        print(
            "bigru.predict: no config.json beside the weights: the clips are read as published, each frame centred "
            "on its own wrists, each clip at its own rate",
            file=sys.stderr,
        )
    length = config.observed if observed is None else observed
    fed = modalities_of(model.encoder.core.input_size)
    assert fed is not None
    config = dataclasses.replace(
        config, observed=length, predicted=length, gaze=fed["gaze"], objects=fed["objects"], surrogate=fed["surrogate"]
    )
    try:
        model.encoder.core.resolve_backend(torch.empty(1, length, config.input_size, device=where))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"backend: {backend} cannot run the network on {where}: {error}") from error
    return model, config
