"""Runs that differ in one thing: `python -m bigru.train --sweep modalities` trains five, one document for all.

They are folders of `{out}/sweep_modalities`, whose results_bigru.md ends with their comparison. The command may be
given again at any time: finished runs are reported again, interrupted ones go on, others begin.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigru.config import ConfigError, TrainConfig
from bigru.data.windows import NoWindowsError
from bigru.files import printable
from bigru.report.document import DOCUMENT
from bigru.report.record import read_run
from bigru.training import run_dir
from bigru.training.distributed import current_team
from bigru.training.run import Parts, read_data_digest, resume, train
from bigru.training.summary import score_table
from bigru.training.trainer import DivergedError

log = logging.getLogger("bigru.train")

NOTHING: dict[str, Any] = {"gaze": False, "objects": False, "surrogate": False}
MODALITIES: dict[str, dict[str, Any]] = {
    "hands": NOTHING,
    "hands + gaze": NOTHING | {"gaze": True},
    "hands + objects": NOTHING | {"objects": True},
    "hands + surrogate": NOTHING | {"surrogate": True},
    "all": dict.fromkeys(NOTHING, True),
}


def sweep_modalities(config: TrainConfig, parts: Parts) -> Path:
    """Trains the settings once with each choice of modalities; returns the folder of the runs, made in `out`.

    A run that diverges, or whose data lack what it needs, does not keep the others from being trained.

    Raises:
        ConfigError: settings that only one of the runs could have.
        DivergedError, NoWindowsError: after all others, the last run that failed; the message names all of them.
    """
    chosen = [name for name in NOTHING if getattr(config.data, name)]
    if chosen:
        raise ConfigError(f"sweep: expected no {', '.join(chosen)} beside it, as it chooses the modalities itself")
    if config.run.weights is not None:
        raise ConfigError(
            f"sweep: expected no weights, which fit one choice of modalities only, got {config.run.weights}"
        )
    team = current_team()
    config = run_dir.with_absolute_data(config)
    out = config.run.out / "sweep_modalities"
    failed: dict[str, DivergedError | NoWindowsError] = {}
    done: dict[str, Path] = {}
    for number, (name, fed) in enumerate(MODALITIES.items(), start=1):
        wanted = replace(config, data=replace(config.data, **fed), run=replace(config.run, out=out))
        # Of several processes the first looks for all.
        found = team.broadcast(str(find_run(out, wanted, parts) or "") if team.first else None)
        print(f"run {number} of {len(MODALITIES)}: {name}", flush=True)
        try:
            done[name] = resume(Path(found), parts=parts) if found else train(wanted, parts)
        except (DivergedError, NoWindowsError) as error:
            log.warning("%s: %s", name, error)
            failed[name] = error
        except KeyboardInterrupt:
            log.warning("the same command goes on with the sweep; what is done is not done again")
            raise
    if done and team.first:
        print(score_table({name: read_run(folder).test for name, folder in done.items()}))
        print(f"the runs' logs are in their folders; {printable(out / DOCUMENT)}")
    if failed:
        last = [*failed.values()][-1]
        raise type(last)(
            f"sweep: {len(failed)} of {len(MODALITIES)} runs failed: "
            + "; ".join(f"{name}: {error}" for name, error in failed.items())
        )
    return out


def find_run(out: Path, wanted: TrainConfig, parts: Parts) -> Path | None:
    """Returns the run of these settings and data in a folder: a finished one, else the last begun; None for none.

    Where the data lie does not count, if the run recorded what they hold. They are read only if a run has these
    settings.
    """
    alike = []
    for path in sorted(out.glob("*/config.json")):
        try:
            config = run_dir.read_config(path.parent)
            if not (path.parent / "summary.json").is_file():
                run_dir.check_resumable(path.parent)
        except ValueError as error:
            # Of another version, torn, or without its checkpoint: no run to go on with.
            log.warning("%s is left alone: %s", printable(path.parent), error)
            continue
        if _comparable(config) == _comparable(wanted):
            alike.append((path.parent, config))
    now = read_data_digest(wanted, parts) if alike else ""
    same = [
        folder
        for folder, config in alike
        if now == (run_dir.read_digest(folder) or (now if config.data.data_root == wanted.data.data_root else None))
    ]
    finished = [folder for folder in same if (folder / "summary.json").is_file()]
    return next(iter((finished or same)[-1:]), None)


def _comparable(config: TrainConfig) -> TrainConfig:
    """Returns the settings without those that change no figure, and without where the data lie."""
    data = replace(config.data, data_root=None, index=None, cache=None, no_cache=False)
    return replace(
        config, data=data, run=replace(config.run, out=Path(), device="auto", threads=None, tensorboard=False)
    )
