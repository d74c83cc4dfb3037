"""`python -m bigru.prove`: checks and times this machine's kernels, for "auto" to choose among.

Each kernel that could serve is held to fp64 at odd sizes, padded and ragged (outputs, h_n, every gradient; memory full
of NaN beforehand; twice to the bit). Those that are right are timed beside ATen's GRU, in turn, over a small grid of
sizes. All of it runs in another process, which a kernel may crash. The record is kept in the user's cache folder, and
is of use with this card or processor, driver, torch, triton and bigru alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bigru.command import ending
from bigru.kernels.record import PRECISIONS, Record, read_record


@ending("prove")
def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns its exit code: 0, 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bigru.prove", description=(__doc__ or "").split("\n")[0])
    for name in ("hidden", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar=name[0].upper(), help="default: a grid")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS[:-1], help="default: fp32, and bf16 on a GPU")
    parser.add_argument("--threads", type=int, help="of a CPU (default: as many as torch takes)")
    parser.add_argument("--seconds", type=float, default=50.0, help="for everything (default: %(default).0f)")
    options = parser.parse_args(argv)
    # Only now: --help need not wait for torch.
    from bigru.proof.prover import prove_here

    sizes = {name: getattr(options, name) for name in ("hidden", "batch", "steps") if getattr(options, name)}
    command = shlex.join(["python", "-m", "bigru.prove", *argv])
    return prove_here(command, sizes, options.precision, options.threads, options.seconds)


def prove(*arguments: str) -> Record:
    """Runs `python -m bigru.prove` with arguments of the command line, and returns its record.

    Raises:
        RuntimeError: the command failed; its message is on stderr.
        RecordError: it left no record.
    """
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bigru.prove", *arguments]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    if code not in (0, 1):  # 1: a kernel is wrong, as the record says
        raise RuntimeError(f"{shlex.join(command)}: exit code {code}")
    from bigru.kernels import proven
    from bigru.kernels.choice import forget
    from bigru.kernels.config import describe
    from bigru.proof.prover import this_device

    forget()
    return read_record(proven.proof_path(describe(this_device())))
