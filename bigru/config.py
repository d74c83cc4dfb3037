"""The settings of a training run: frozen dataclasses, made from mappings under our or the reference trainer's names."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from bigru.command import CommandError
from bigru.files import printable, user_path
from bigru.kernels.backends import Backend
from bigru.layout import MODALITY_SIZES, POSE_SIZE

log = logging.getLogger(__name__)


# As the help shows them: what they take, and no empty default.
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
OptionalRate = Annotated[float | None, tyro.conf.arg(metavar="FPS", help_behavior_hint="")]
# Without a --no- of its own.
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


class ConfigError(CommandError, ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""


def check_writable(out: Path) -> None:
    """Raises ConfigError where nothing can be written into a folder, which need not be there yet."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ConfigError(f"out: expected a folder that can be written, got {printable(nearest)}")


def latest_run(path: Path) -> Path:
    """Returns the last run in the folder around, or in `runs`, for a path `latest` that is not there; else the path."""
    if path.name != "latest" or path.exists():
        return path
    around = RunConfig().out if path == Path("latest") else path.parent
    runs = sorted(found.parent for found in around.glob("*/config.json"))
    if not runs:
        raise ConfigError(f"latest: {printable(around)} holds no run")
    return runs[-1]


def expand_home(settings: Any) -> None:
    """Replaces a leading ~ in every path of a frozen dataclass, from the command line or a file, by the home folder."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, Path):
            object.__setattr__(settings, item.name, user_path(value))
        elif isinstance(value, tuple):
            object.__setattr__(settings, item.name, tuple(map(user_path, value)))


@dataclass(frozen=True)
class DataConfig:
    """Which clips are read and how they are cut into windows."""

    data_root: OptionalPath = None
    """Folder of clips, `{subtask}/{stem}.h5`; without it a small synthetic dataset is written and used."""
    index: OptionalPath = None
    """Tab-separated index of clips; default: subtasks_byTask_time.csv in the data root or beside it."""
    observed: int = 60
    """Frames observed per window (the network reads these)."""
    predicted: int = 60
    """Frames predicted per window; must equal `observed`: output frame t is read off encoder step t."""
    stride: int = 15
    """Frames between the starts of two windows of one clip."""
    split: Literal["participant", "time"] = "participant"
    """By participant (train 1-48, val 49-59, test 60-70), or each clip's windows in time order."""
    gaze: bool = False
    """Feed normalised gaze (2 features)."""
    objects: bool = False
    """Feed object boxes (30 x 4 = 120 features)."""
    surrogate: bool = False
    """Feed the robot surrogate's hand boxes (2 x 4 = 8 features)."""
    mask_missing: bool = True
    """Leave the joints of missing hands out of the loss and of the true per-joint error."""
    strict: bool = False
    """Stop at the first clip that cannot be used instead of counting and skipping it."""
    nan_missing: bool = False
    """Take a hand, a gaze or a box with NaN in it for missing; default: such a clip cannot be used."""
    resample: OptionalRate = None
    """Frames per second, 1 to 1000, that every clip is brought to; default: each clip keeps its own."""
    centre: Literal["frame", "last"] = "frame"
    """Origin of the hands: each frame's own midpoint of the wrists, as published, or the last observed frame's, so
    that the motion of the hands as a whole is predicted too."""
    cache: OptionalPath = None
    """Folder for the file of frames that the next run maps instead of reading the clips; default: the data root."""
    no_cache: Flag = False
    """Read the clips every time, and leave no file of frames."""

    def __post_init__(self) -> None:
        expand_home(self)
        _at_least(1, self, "observed", "predicted", "stride")
        if self.observed != self.predicted:
            raise ConfigError(
                f"predicted: expected {self.observed} as in observed (output frame t is read off encoder "
                f"step t), got {self.predicted}; set both"
            )
        if self.resample is not None and not 1 <= self.resample <= 1000:
            raise ConfigError(f"resample: expected 1 to 1000 frames per second, got {self.resample}")
        if self.centre not in ("frame", "last"):
            raise ConfigError(f"centre: expected frame or last, got {self.centre!r}")

    @property
    def departures(self) -> list[str]:
        """The departures of the data from the published protocol, in words; empty by default."""
        said = ["centred on the last observed frame"] * (self.centre == "last")
        if self.resample is not None:
            said.append(f"resampled to {self.resample:g} frames per second")
        return said + ["NaN read as missing"] * self.nan_missing

    @property
    def input_size(self) -> int:
        """Features per frame fed to the network: 84 for hands, then 2, 120 and 8 for the other modalities."""
        return POSE_SIZE + sum(size for name, size in MODALITY_SIZES.items() if getattr(self, name))


@dataclass(frozen=True)
class ModelConfig:
    """The forecaster: a bidirectional GRU encoder and a linear pose head."""

    hidden_size: int = 128
    """Hidden units per direction."""
    num_layers: int = 2
    """Stacked bidirectional layers."""
    dropout: float = 0.2
    """Dropout before the pose head's linear layer."""
    residual: bool = False
    """Predict the displacement from the last observed frame, not the hands themselves as published."""

    def __post_init__(self) -> None:
        _at_least(1, self, "hidden_size", "num_layers")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected at least 0 and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class OptimConfig:
    """The published protocol: AdamW, warm-up, cosine decay, gradient clipping, early stopping."""

    batch_size: int = 64
    """Windows per step, of all processes together."""
    epochs: int = 120
    """Most epochs to run."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    weight_decay: float = 1e-5
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    warmup_epochs: int = 5
    """Epochs over which the learning rate rises linearly, step by step."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    patience: int = 20
    """Epochs without a gain in validation MPJPE before the run stops."""
    min_delta: float = 0.001
    """Smallest gain in validation MPJPE that counts."""

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", "epochs", "patience")
        _at_least(0, self, "weight_decay", "warmup_epochs", "min_lr", "min_delta")
        for name in ("lr", "grad_clip"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}: expected a finite number above 0, got {value}")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr: expected at most lr ({self.lr}), got {self.min_lr}")


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run is executed."""

    out: Path = Path("runs")
    """Folder for the document, its plots and one sub-folder per run."""
    seed: int = 42
    """Seed of the weights, of dropout and of the order of the windows."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    threads: OptionalInt = None
    """Threads of the CPU; default: as OMP_NUM_THREADS says, else 1 where the CPU trains: a second one gains a fifth on
    an idle machine and loses most of the speed on a busy one."""
    backend: Backend = "auto"
    """Which implementation of the GRU to run."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """Products of the recurrence: fp32 (error below 1e-5) or tf32."""
    weights: OptionalPath = None
    """Start from these weights (.pt, .pth or .safetensors), the published state dict's names."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Forward and backward passes of training under autocast: bf16, or fp16 with a scaled loss. Weights, validation
    and test stay fp32. ATen's GRU on a CPU knows no autocast, so that there the head alone is of 16 bits."""
    graph: bool = False
    """Replay each training step as one CUDA graph; needs a GPU, one process, and no fp16."""
    prove: bool = True
    """On a GPU without a proof for the run's sizes, run `python -m bigru.prove` for them first."""
    tensorboard: bool = False
    """Write curves and pictures for TensorBoard into the run's folder; needs `pip install 'bigru[tensorboard]'`."""

    def __post_init__(self) -> None:
        expand_home(self)
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed: expected 0 to 2147483647, got {self.seed}")
        if self.threads is not None:
            _at_least(1, self, "threads")
        if self.graph and self.amp == "fp16":
            raise ConfigError("graph: expected amp none or bf16 with it, got fp16")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; the defaults are the published protocol."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the settings as JSON can hold them, {section: {name: value}}, paths as text."""
        return {
            section: {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
            for section, settings in asdict(self).items()
        }


SECTIONS: dict[str, type] = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "run": RunConfig}
OWNER = {item.name: section for section, kind in SECTIONS.items() for item in fields(kind)}
HINTS: dict[str, Any] = {name: hint for kind in SECTIONS.values() for name, hint in get_type_hints(kind).items()}

# The reference trainer's configuration: its name, and ours.
REFERENCE_NAMES = {
    "wd": "weight_decay",
    "scheduler.warmup_epochs": "warmup_epochs",
    "scheduler.min_lr": "min_lr",
    "early_stopping.patience": "patience",
    "early_stopping.min_delta": "min_delta",
    "early_stopping.delta": "min_delta",
    "data.csv_path": "index",
    "data.h5_dir": "data_root",
    "data.obs_len": "observed",
    "data.pred_len": "predicted",
    "data.include_gaze": "gaze",
    "data.include_obj_bbox": "objects",
    "data.include_surrogate_bbox": "surrogate",
}
# Its settings that leave no choice here: what they must be.
REFERENCE_FIXED: dict[str, Any] = {
    "arch": "bigru",
    "optim": "adamw",
    "scheduler.name": "cosine",
    "loss.pose": 1.0,
    "class_weights": False,
    "data.obj_box_dim": 120,
    "data.sur_box_dim": 8,
}
# What others call our settings, for a hint: too unlike for difflib.
OTHER_NAMES = {
    "learning_rate": "lr",
    "max_grad_norm": "grad_clip",
    "clip": "grad_clip",
    "fps": "resample",
    "gpu": "device",
}
NESTS = {*SECTIONS, "loss", "scheduler", "early_stopping"}


def shown(value: Any) -> str:
    """Returns a value as an error shows it: not all of a long one, or of one that its aliases make endless."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxlong = shown.maxother = 60
    shown.maxlevel = 2
    return shown.repr(value)


def from_mapping(mapping: Mapping[str, Any], source: str) -> TrainConfig:
    """Builds the settings from nested or flat keys and values; `source` is named in the errors.

    Raises:
        ConfigError: for an unknown or repeated key, or a value that cannot be used.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: expected a mapping of settings, got {shown(mapping)}")
    settings: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in _leaves(mapping):
        name = _our_name(key, value, source)
        if name is None:
            continue
        section = settings[OWNER[name]]
        if name in section:
            raise ConfigError(f"{source}: {key}: {name} is given twice")
        section[name] = _convert(value, HINTS[name], f"{source}: {key}")
    try:
        return TrainConfig(**{section: SECTIONS[section](**values) for section, values in settings.items()})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_settings(path: Path) -> TrainConfig:
    """Reads the config.json of a run; raises ConfigError where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(path)} is not JSON: {error}") from error
    return from_mapping(content, printable(path))


def _leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if prefix == "" and key in NESTS and isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def _our_name(key: str, value: Any, source: str) -> str | None:
    """Returns the field that a key of a file sets, None for one that only confirms what holds anyway."""
    section, _, name = key.rpartition(".")
    if key in REFERENCE_NAMES:
        return REFERENCE_NAMES[key]
    if name in OWNER and section in ("", OWNER[name]):
        return name
    if section == "loss" and key not in REFERENCE_FIXED:
        if value not in (0, None, False):
            raise ConfigError(f"{source}: {key}: the forecaster has the pose loss only; expected 0, got {shown(value)}")
        log.warning("%s: %s is ignored: the forecaster has the pose loss only", source, key)
        return None
    if key in REFERENCE_FIXED:
        expected = REFERENCE_FIXED[key]
        same = value.lower() == expected if isinstance(value, str) and isinstance(expected, str) else value == expected
        if not same:
            raise ConfigError(f"{source}: {key}: expected {expected!r}, the only choice there is, got {shown(value)}")
        return None
    known = [*OWNER, *REFERENCE_NAMES, *REFERENCE_FIXED]
    near = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
    near = near or difflib.get_close_matches(key, known, n=3) or difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists the settings"
    raise ConfigError(f"{source}: unknown setting {key}{hint}")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Returns a value from a file as its field's type; YAML reads 1e-5 as text, so numbers may come as text."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{key}: expected one of {', '.join(map(repr, get_args(hint)))}, got {shown(value)}")
    optional = type(None) in get_args(hint)
    if optional:
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    # YAML takes 2025-02-28 for a date and 3 for a number.
    quotes = "; in quotes it is text" if hint in (Path, str) and value is not None else ""
    wrong = ConfigError(f"{key}: expected {_KINDS[hint]}, got {shown(value)}" + quotes)
    if hint in (int, float):
        try:
            if isinstance(value, bool):
                raise wrong
            number = float(value)
            if hint is float:
                return number
            if number != int(number):
                raise wrong
            return int(value) if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
    if hint is Path:
        if not isinstance(value, (str, Path)) or not str(value):
            raise wrong
        return Path(value)
    if not isinstance(value, hint):
        raise wrong
    return value


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _at_least(least: int, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        # Written so that NaN fails too.
        if not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
