"""What a training run is made of: frozen dataclasses, read from YAML and the command line, written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


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

    @property
    def input_size(self) -> int:
        """Features per frame fed to the network: 84 for hands, then 2, 120 and 8 for the other modalities."""
        return 84 + 2 * self.gaze + 120 * self.objects + 8 * self.surrogate


@dataclass(frozen=True)
class ModelConfig:
    """The forecaster: a bidirectional GRU encoder and a linear pose head."""

    hidden_size: int = 128
    """Hidden units per direction."""
    num_layers: int = 2
    """Stacked bidirectional layers."""
    dropout: float = 0.2
    """Dropout before the pose head's linear layer."""


@dataclass(frozen=True)
class OptimConfig:
    """The published protocol: AdamW, warm-up, cosine decay, gradient clipping, early stopping."""

    batch_size: int = 64
    epochs: int = 120
    """Most epochs to run."""
    lr: float = 1e-3
    """Learning rate after warm-up."""
    weight_decay: float = 1e-5
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


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run is executed."""

    out: Path = Path("runs")
    """Folder for the document, its plots and one sub-folder per run."""
    seed: int = 42
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Which implementation of the GRU to run."""
    precision: Literal["fp32", "tf32"] = "fp32"
    """Products of the recurrence: fp32 (error below 1e-5) or tf32."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; the defaults are the published protocol."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
