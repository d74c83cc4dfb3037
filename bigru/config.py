"""What a training run is made of: frozen dataclasses, read from YAML and the command line, written as JSON."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
import yaml

from bigru.files import shell_line
from bigru.kernels.registry import Backend
from bigru.layout import MODALITY_SIZES, POSE_SIZE

log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class DataConfig:
    """Which clips are read and how they are cut into windows."""

    data_root: Path | None = None
    """Folder of clips, `{subtask}/{stem}.h5`; without it a small synthetic dataset is written and used."""
    index: Path | None = None
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
    resample: float | None = None
    """Frames per second, 1 to 1000, that every clip is brought to; default: each clip keeps its own."""
    centre: Literal["frame", "last"] = "frame"
    """Origin of the hands: each frame's own midpoint of the wrists, as published, or the last observed frame's, so
    that the motion of the hands as a whole is predicted too."""
    cache: Path | None = None
    """Folder for the file of frames that the next run maps instead of reading the clips; default: the data root."""
    no_cache: bool = False
    """Read the clips every time, and leave no file of frames."""

    def __post_init__(self) -> None:
        for name in ("observed", "predicted", "stride"):
            _at_least(1, **{name: getattr(self, name)})
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
        """What is done to the data that the published protocol does not do, in words; empty by default."""
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

    def __post_init__(self) -> None:
        _at_least(1, hidden_size=self.hidden_size, num_layers=self.num_layers)
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
        _at_least(1, batch_size=self.batch_size, epochs=self.epochs, patience=self.patience)
        _at_least(
            0,
            weight_decay=self.weight_decay,
            warmup_epochs=self.warmup_epochs,
            min_lr=self.min_lr,
            min_delta=self.min_delta,
        )
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
    backend: Backend = "auto"
    """Which implementation of the GRU to run."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """Products of the recurrence: fp32 (error below 1e-5) or tf32."""
    weights: Path | None = None
    """Start from these weights (.pt, .pth or .safetensors), the published state dict's names."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Forward and backward passes of training under autocast: bf16, or fp16 with a scaled loss. Weights, validation
    and test stay fp32. ATen's GRU on a CPU knows no autocast, so that there the head alone is of 16 bits."""
    graph: bool = False
    """Replay each training step as one CUDA graph; needs a GPU, one process, and no fp16."""
    tensorboard: bool = False
    """Write curves and pictures for TensorBoard into the run's folder; needs `pip install 'bigru[tensorboard]'`."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed: expected 0 to 2147483647, got {self.seed}")
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
        """The settings as JSON can hold them, {section: {name: value}}, paths as text."""
        return {
            section: {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
            for section, settings in asdict(self).items()
        }


@dataclass(frozen=True)
class Arguments(TrainConfig):
    """The command line: a run's settings, and where to take them from."""

    config: Path | None = None
    """YAML file of settings, under our names or the reference trainer's; other options override it."""
    resume: Path | None = None
    """Run folder to go on with, with its settings; `latest`: the last one. Beside it may stand --data-root and --index
    (where its data are now), --device, --epochs and --tensorboard."""
    changes: tyro.conf.Suppress[dict[str, Any] | None] = None
    """Settings that stand beside --resume."""

    sweep: Literal["modalities"] | None = None
    """Train once with hands alone, then with gaze, objects, surrogate and all; what is done is not done again."""

    @property
    def settings(self) -> TrainConfig:
        """The run's settings alone."""
        return TrainConfig(self.data, self.model, self.optim, self.run)


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
NESTS = {*SECTIONS, "loss", "scheduler", "early_stopping"}


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Reads the command line, over the YAML file it may name, over the defaults.

    Args:
        argv: the arguments without the program's name.

    Raises:
        ConfigError: for a file or a value that cannot be used, or options beside --resume.
        SystemExit: after --help (0) or an unknown option (2).
    """
    # These two are needed before the rest can be read: the file's settings are the other options' defaults.
    first = argparse.ArgumentParser(prog="python -m bigru.train", add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    known, others = first.parse_known_args(argv)
    asks_help = "-h" in others or "--help" in others
    if known.resume is not None and not asks_help:
        if known.config is not None:
            others = ["--config", *others]
        return Arguments(resume=known.resume, changes=_resume_changes(others))
    base = read_yaml(known.config) if known.config is not None else TrainConfig()
    return tyro.cli(
        Arguments,
        prog="python -m bigru.train",
        description="Train the hand-motion forecaster, score it on the test split and write results_bigru.md. "
        "The defaults are the published protocol.",
        default=Arguments(base.data, base.model, base.optim, base.run, config=known.config),
        args=others,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _resume_changes(argv: Sequence[str]) -> dict[str, Any] | None:
    """Returns the settings that may stand beside --resume, by name; None for none."""
    parser = argparse.ArgumentParser(prog="python -m bigru.train --resume RUN", allow_abbrev=False)
    parser.add_argument("--data-root", type=_path)
    parser.add_argument("--index", type=_path)
    parser.add_argument("--device")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction)
    known, others = parser.parse_known_args(argv)
    if others:
        raise ConfigError(
            "--resume: a run goes on with the settings it began with; only --data-root, --index, --device, --epochs "
            f"and --tensorboard may stand beside it, got {shlex.join(others)}"
        )
    return {name: value for name, value in vars(known).items() if value is not None} or None


def _path(text: str) -> Path:
    return Path(text).expanduser()


def read_yaml(path: Path) -> TrainConfig:
    """Reads settings from a YAML file, under our names (flat or in sections) or the reference trainer's.

    A file that holds several models' settings by name is read at `bigru`; what stands beside it must be mappings
    under other names: other models, or what they share. Relative paths are relative to the current folder, as they
    are on the command line.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, a setting beside `bigru` or a value that cannot be
            used.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"config: {path}: expected a mapping of settings, got {type(content).__name__}")
    if "bigru" not in content:
        return from_mapping(content, str(path))
    # What is not read must not look like a setting.
    stray = [
        str(key)
        for key, value in content.items()
        if key != "bigru" and (key in NESTS or not isinstance(value, Mapping))
    ]
    if stray:
        raise ConfigError(
            f"config: {path}: {', '.join(stray)} beside bigru: settings belong in it; only other models' "
            "may stand beside it"
        )
    return from_mapping(content["bigru"], str(path))


def from_mapping(mapping: Mapping[str, Any], source: str) -> TrainConfig:
    """Builds the settings from nested or flat keys and values; `source` is named in the errors.

    Raises:
        ConfigError: for an unknown or repeated key, or a value that cannot be used.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: expected a mapping of settings, got {mapping!r}")
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


def command_line(config: TrainConfig) -> str:
    """The command that starts a run with these settings."""
    words = ["python", "-m", "bigru.train"]
    default = TrainConfig().as_dict()
    for section, settings in config.as_dict().items():
        for name, value in settings.items():
            if value == default[section][name]:
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
    return shell_line(words)


def _leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if prefix == "" and key in NESTS and isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def _our_name(key: str, value: Any, source: str) -> str | None:
    """The field that a key of a file sets; None for one that only confirms what is so anyway."""
    section, _, name = key.rpartition(".")
    if key in REFERENCE_NAMES:
        return REFERENCE_NAMES[key]
    if name in OWNER and section in ("", OWNER[name]):
        return name
    if section == "loss" and key not in REFERENCE_FIXED:
        if value not in (0, None, False):
            raise ConfigError(f"{source}: {key}: the forecaster has the pose loss only; expected 0, got {value!r}")
        log.warning("%s: %s is ignored: the forecaster has the pose loss only", source, key)
        return None
    if key in REFERENCE_FIXED:
        expected = REFERENCE_FIXED[key]
        same = value.lower() == expected if isinstance(value, str) and isinstance(expected, str) else value == expected
        if not same:
            raise ConfigError(f"{source}: {key}: expected {expected!r}, the only choice there is, got {value!r}")
        return None
    known = [*OWNER, *REFERENCE_NAMES, *REFERENCE_FIXED]
    near = difflib.get_close_matches(key, known, n=3) or difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists the settings"
    raise ConfigError(f"{source}: unknown setting {key}{hint}")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A value as a file gives it, as its field's type; YAML reads 1e-5 as text, so numbers may come as text."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{key}: expected one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")
    optional = type(None) in get_args(hint)
    if optional:
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    wrong = ConfigError(f"{key}: expected {_KINDS[hint]}, got {value!r}")
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
        return Path(value).expanduser()
    if not isinstance(value, hint):
        raise wrong
    return value


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def _at_least(least: int, **values: float) -> None:
    for name, value in values.items():
        # Written so that NaN fails too.
        if not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
