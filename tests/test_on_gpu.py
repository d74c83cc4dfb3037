"""benchmarks/on_gpu.sh with a Python that does nothing: the order of its steps, their limits, and the exit code."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
PYTHON = """#!/bin/sh
case "$2" in *xdist*) exit 1;; esac
echo "$PWD|$XDG_CACHE_HOME|$*" >>"$SAID"
case "$*" in *"$HANGS"*) exec sleep 60;; *"$FAILS"*) exit 3;; esac
"""
TIMEOUT = """#!/bin/sh
shift 2
exec "$REAL" --kill-after=1 2 "$@"
"""


@pytest.mark.skipif(not shutil.which("timeout") or not shutil.which("bash"), reason="needs bash and timeout")
@pytest.mark.parametrize(
    ("fails", "hangs", "code", "steps"),
    [
        ("nothing", "nothing", 0, 4),
        ("bigru.prove", "nothing", 3, 4),
        ("nothing", "benchmarks.gpu", 124, 4),
        ("import torch", "nothing", 3, 1),  # no GPU, and so nothing to be had
    ],
    ids=["well", "wrong", "late", "no GPU"],
)
def test_steps(fails, hangs, code, steps, tmp_path):
    for name, text in (("python3", PYTHON), ("timeout", TIMEOUT)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said, out = tmp_path / "said", tmp_path / "what is found" / "here"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REAL": shutil.which("timeout")}
    environment |= {"SAID": str(said), "FAILS": fails, "HANGS": hangs, "MINUTES": "0.5"}
    command = ["bash", str(SCRIPT), str(out.relative_to(tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    lines = [line.split("|") for line in said.read_text().splitlines()]
    assert {(folder, cache) for folder, cache, _ in lines} == {(str(SCRIPT.parents[1]), str(out))}
    words = [
        "import torch",
        "-m bigru.prove",
        f"-m benchmarks.gpu --out {out} --minutes 0.5",
        "-m pytest tests/kernels",
    ]
    assert len(lines) == steps
    assert all(word in line[2] for word, line in zip(words, lines, strict=False))
    assert done.stdout == (out / "on_gpu.log").read_text()
    assert done.stdout.count("== exit code 0") == steps - (code != 0)
    assert ("late" in done.stdout) == (code == 124)
