"""The training command: `python -m bigru.train` trains the forecaster, scores it and writes results_bigru.md.

A run is a folder, `{out}/{stamp}`, from which the document is made and at which an interrupted run goes on:
config.json, metrics.jsonl (a line an epoch), checkpoint.pt (after each epoch, and where a signal stopped the run),
weights.safetensors (the best so far), train.log, skipped.tsv, run.lock, which keeps a second run out of the folder,
diverged.npz with the batch where the loss broke, and, once it has finished, samples.npz and summary.json.

`torchrun --nproc-per-node N -m bigru.train ...` trains in N processes: the batch is the same, divided among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bigru.command import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run("train", argv)


if __name__ == "__main__":
    sys.exit(main())
