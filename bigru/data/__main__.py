"""Looks through data before anything is trained on it: `python -m bigru.data check ROOT`, `describe CLIP`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bigru.command import ending, prepare_console
from bigru.config import DataConfig, OptionalPath, expand_home
from bigru.data.check import MOST_SHOWN, describe, survey
from bigru.data.hdf5 import ClipError, DataError
from bigru.files import printable, write_atomically, write_lines


@dataclass(frozen=True)
class Check(DataConfig):
    """Tell what a dataset holds, split by split, and every clip that cannot be used, with the reason.

    Exit code 0, or with --strict 1 where a clip cannot be used; 2 where there is no dataset.
    """

    data_root: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="ROOT")]] = field()
    """Folder of clips, `{subtask}/{stem}.h5`, with the index in it or beside it."""
    strict: bool = False
    """Exit with 1 if a clip is skipped or lies in two splits."""
    out: Path = Path("data_check.tsv")
    """Where the list of all such clips goes, if they are too many to be shown."""
    cache: tyro.conf.Suppress[Path | None] = None
    no_cache: tyro.conf.Suppress[bool] = True
    mask_missing: tyro.conf.Suppress[bool] = True
    centre: tyro.conf.Suppress[Literal["frame", "last"]] = "frame"


@dataclass(frozen=True)
class Describe:
    """Tell what one clip holds, and draw its hands over time.

    Exit code 0, or 1 where the clip cannot be used.
    """

    clip: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CLIP")]]
    """An .h5 file."""
    out: OptionalPath = None
    """Where the picture goes; default: the clip's name with .png, in the current folder."""
    observed: int = 60
    """Frames observed per window, and as many predicted."""
    stride: int = 15
    """Frames between the starts of two windows."""
    nan_missing: bool = False
    """Take a hand, a gaze or a box with NaN in it for missing."""

    def __post_init__(self) -> None:
        expand_home(self)


@ending("data")
def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    command = tyro.cli(
        Annotated[Check, tyro.conf.subcommand("check")] | Annotated[Describe, tyro.conf.subcommand("describe")],
        prog="python -m bigru.data",
        description=__doc__,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return check(command) if isinstance(command, Check) else describe_and_draw(command)


def check(config: Check) -> int:
    """Prints the survey of a dataset, and writes the list of clips that is too long for it."""
    found = survey(config)
    print(found.text())
    if max(found.counts.values(), default=0) > MOST_SHOWN:
        write_lines(config.out, map("\t".join, [("stem", "reason", "detail"), *map(astuple, found.skipped)]))
        print(f"\nall clips with a fault: {printable(config.out)}")
    return 1 if config.strict and found.skipped else 0


def describe_and_draw(command: Describe) -> int:
    """Prints what a clip holds and writes its picture."""
    try:
        text, clip = describe(command.clip, command.observed, command.stride, command.nan_missing)
    except ClipError as error:
        raise DataError(f"{printable(command.clip)}: {error}") from error
    print(text)
    if clip is None:
        return 1
    # Matplotlib takes a second to import, which `check` has no use for.
    from bigru.report.clip import draw_clip
    from bigru.report.figures import png

    out = Path(f"{command.clip.stem}.png") if command.out is None else command.out
    name = printable(command.clip.stem)
    write_atomically(out, png(draw_clip(name, clip.fps, clip.seconds, clip.hands, clip.present, clip.rate)))
    print(f"picture: {printable(out)}")
    return 0


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
