"""The forecasting command: `python -m bigru.predict --weights RUN CLIP [CLIP ...]`; see bigru.model.prediction."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__":  # before the imports that need the extra
    from bigru.command import run

    sys.exit(run("predict"))

import numpy as np
import tyro
from tqdm import tqdm

from bigru.command import ending
from bigru.config import ConfigError, DataConfig, Flag, OptionalInt, OptionalRate, check_writable, expand_home
from bigru.files import printable
from bigru.kernels.backends import Backend

if TYPE_CHECKING:
    from bigru.model.forecaster import HandForecaster


@dataclass(frozen=True)
class Arguments:
    """Forecast the motion of both hands in clips, and write each forecast as numbers and pictures.

    Positions are relative to the midpoint of the two wrists in the same frame, as the network is trained, or, of a run
    with --centre last, to the image's corner. Those named _norm are fractions of the image's width (x) and height (y),
    those named _px pixels of the 1728 x 972 image; y points down.
    """

    clips: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="CLIP ...", help_behavior_hint="")]]
    """Clips, .h5 files of at least the observed length, or folders, with all clips below them."""
    weights: Path
    """A run's folder or weights.safetensors, with its config.json beside it, or a published state dict (.pt, .pth)."""
    out: Path = Path("predictions")
    """Folder for CLIP.npz, CLIP.csv, CLIP.png and CLIP.gif."""
    start: OptionalInt = None
    """First observed frame, from 0. Default: the last with its whole true future in the clip, else the last at all."""
    observed: OptionalInt = None
    """Frames observed, and as many predicted. Default: as in config.json beside the weights, else 60."""
    fps: OptionalRate = None
    """Frames per second of clips whose timestamps tell none. Default: as documented for the participant in the name."""
    stream: Flag = False
    """Replay each clip frame by frame as a robot's loop would: a forecast after every frame that has the observed
    length behind it. Prints the latency and writes CLIP.stream.npz instead of the other files."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    threads: OptionalInt = None
    """Threads of the CPU; default: as OMP_NUM_THREADS says, else 1 where the CPU computes."""
    backend: Backend = "auto"
    """Which implementation of the GRU to run."""

    def __post_init__(self) -> None:
        expand_home(self)


@ending("predict")
def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns its exit code: 0, 1 some clips cannot be used, 2 none can."""
    arguments = tyro.cli(Arguments, prog="python -m bigru.predict", args=argv)
    clips = find_clips(arguments.clips)
    check_writable(arguments.out)
    # Only now: the help and a mistake in the options need not wait for torch.
    from bigru.environment import pick_device, set_threads
    from bigru.model.load import load_model

    set_threads(arguments.threads, pick_device(arguments.device))
    model, config = load_model(
        arguments.weights, device=arguments.device, backend=arguments.backend, observed=arguments.observed
    )
    # On a terminal alone, and for more than one.
    bar = tqdm(clips, "forecasting", unit="clip", leave=False, disable=None if len(clips) > 1 else True)
    failed = [not _carry_out(model, config, clip, arguments) for clip in bar]
    return 0 if not any(failed) else 2 if all(failed) else 1


def find_clips(paths: Sequence[Path]) -> list[Path]:
    """Returns the clips named, and those below the folders named.

    Raises:
        ConfigError: no clip, or two of one name.
    """
    clips = [clip for path in paths for clip in (sorted(path.rglob("*.h5")) if path.is_dir() else [path])]
    stems = [clip.stem for clip in clips]
    if not stems:
        where = f" below {', '.join(map(printable, paths))}" if paths else ""
        raise ConfigError(f"clips: expected at least one .h5 file, got none{where}")
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ConfigError(
            f"clips: expected names of their own, as the files written bear them, got twice: {', '.join(twice)}"
        )
    return clips


def _carry_out(model: HandForecaster, config: DataConfig, clip: Path, arguments: Arguments) -> bool:
    """Forecasts one clip, says what was written or why not, and tells whether it was."""
    from bigru.data.hdf5 import ClipError
    from bigru.model.prediction import forecast, write
    from bigru.streaming import write_stream

    try:
        if arguments.stream:
            tqdm.write(write_stream(model, config, clip, arguments.out, arguments.fps))
            return True
        result = forecast(model, clip, config, arguments.start, arguments.fps)
    except (ClipError, ConfigError) as error:
        tqdm.write(f"bigru.predict: {printable(clip)}: {error}", file=sys.stderr)
        return False
    paths = write(result, arguments.out)
    known = int(np.isfinite(result.target).any(axis=1).sum())
    judged = f"mean error {result.mean_error_px:.1f} px over {known} true frames" if known else "no true future"
    rate = f" at a frame rate that is assumed: {result.assumed}" if result.assumed else ""
    said = (
        f"{printable(clip.stem)}: frames {result.start} to {result.start + config.observed - 1} observed, "
        f"{config.predicted} predicted ({config.predicted / result.fps:.2f} s{rate}); {judged}"
    )
    tqdm.write("\n".join([said, *(f"  {printable(path)}" for path in paths)]))
    return True
