"""Sessions of the project: `python -m nox -s NAME`; without -s, what CI does.

All sessions but `tests_lowest` share one environment, .nox/shared, with the versions pinned in constraints.txt;
`kernels` sees it from one of its own, .nox/kernels, that has an older triton and numpy.
"""

import hashlib
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["lint", "tests", "kernels", "resources", "bench", "gpu_smoke"]
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"

ROOT = Path(__file__).parent
CONSTRAINTS = "constraints.txt"
# onnxscript is for the tests of torch.onnx.export, which skip without it.
EVERYTHING = (".[test]", "ruff", "mypy", "nox", "types-PyYAML", "onnxscript")
C_FILES = ("bigru/kernels/cpu_recurrence.c", "bigru/kernels/cpu_tiles.h")
INSTALLED_FROM = ("pyproject.toml", "setup.py", *C_FILES, CONSTRAINTS, "noxfile.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Two processes of one thread each; more of either only wait for one another on two cores.
IN_TWO_PROCESSES = ("-n", "2", "--dist", "worksteal")


def prepare(session: nox.Session, name: str, *packages: str, below: str | None = None) -> str:
    """Returns the Python of the environment .nox/NAME, which is made, or renewed where its requirements changed.

    With `below`, what is installed in that environment is seen in this one too, unless this one has its own.
    """
    folder = ROOT / ".nox" / name
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    content = b"".join((ROOT / file).read_bytes() for file in INSTALLED_FROM)
    digest, stamp = hashlib.sha256(content).hexdigest(), folder / "requirements.sha256"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest:
        session.run_install(sys.executable, "-m", "venv", str(folder), external=True)
        if below is not None:
            path = Path(site_packages(folder), f"{below}.pth")
            path.write_text(f"import site; site.addsitedir({site_packages(folder.with_name(below))!r})\n", "utf-8")
        # What is imported gets compiled then; all of it takes half a minute.
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
        session.run_install(*pip, *packages, external=True)
        stamp.write_text(digest, encoding="utf-8")
    return python


def site_packages(folder: Path) -> str:
    return sysconfig.get_path("purelib", "venv", {"base": str(folder)})


def run(session: nox.Session, module: str, *arguments: str, **options: Any) -> None:
    """Runs `python -m MODULE` in the shared environment."""
    python = prepare(session, "shared", "-c", CONSTRAINTS, "-e", *EVERYTHING)
    session.run(python, "-m", module, *arguments, external=True, **options)


@nox.session(venv_backend="none")
def train(session: nox.Session) -> None:
    """Trains the forecaster (arguments after -- go to bigru.train) and writes the performance document."""
    # What it prints for the reader's shell.
    again = {"BIGRU_TRAIN": "python -m nox -s train --"}
    # Ctrl-C reaches the training too, which then finishes a step and writes a checkpoint.
    patience = {"interrupt_timeout": 60.0, "terminate_timeout": 60.0}
    run(session, "bigru.train", *session.posargs, env=again, **patience)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Runs the test suite; the kernels in Triton's interpreter where there is no GPU."""
    run(session, "pytest", *IN_TWO_PROCESSES, *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Runs ruff and mypy."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "mypy")


@nox.session(venv_backend="none")
def kernels(session: nox.Session) -> None:
    """Tests the kernels on the oldest supported triton (a GPU machine's) and compiles them there for sm_90.

    Without the slow tests, which `tests` runs on the newest triton, and without the C extension. All
    architectures take ten minutes more: `.nox/kernels/bin/python -m bigru.kernels.resources`.
    """
    prepare(session, "shared", "-c", CONSTRAINTS, "-e", *EVERYTHING)
    # Its interpreter needs numpy below 2.4.
    python = prepare(session, "kernels", "triton==3.6.0", "numpy<2.4", below="shared")
    tests = ("-m", "pytest", "-p", "without_extension", "tests/kernels", "-m", "not slow", *session.posargs)
    session.run(python, *tests, env=ONE_THREAD | {"PYTHONPATH": "tests"}, external=True)
    measured = ("-m", "bigru.kernels.resources", "--arch", "sm_90")
    session.run(python, *measured, env={"TRITON_INTERPRET": "0"}, external=True)


@nox.session(venv_backend="none")
def resources(session: nox.Session) -> None:
    """Compiles every kernel for sm_80, sm_90, sm_100, gfx942 and gfx1100; fails if one spills or does not fit."""
    run(session, "bigru.kernels.resources", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Runs the benchmarks: the full comparison on a GPU, a small one on a CPU's one thread, which says so."""
    columns = ("--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname")
    run(session, "pytest", "benchmarks", *columns, *session.posargs, env=ONE_THREAD)


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Proves every kernel on this machine's GPU and times it beside nn.GRU; at most nine minutes, one JSON file."""
    run(session, "benchmarks.gpu", *(session.posargs or ["--out", "benchmarks/results"]))


@nox.session(venv_backend="none")
def gpu_smoke(session: nox.Session) -> None:
    """Runs the code of `gpu` at tiny sizes on a CPU."""
    out = ["--out", session.create_tmp()]
    run(session, "benchmarks.gpu", "--cpu-smoke", *(session.posargs or out), env=ONE_THREAD)


@nox.session(python="3.12" if shutil.which("python3.12") else None, default=False)
def tests_lowest(session: nox.Session) -> None:
    """Runs the test suite at the lower bounds of pyproject.toml; installs a CUDA build of torch, several gigabytes."""
    session.install("-c", "constraints-lowest.txt", "-e", ".[test]")
    session.run("python", "-m", "pytest", *IN_TWO_PROCESSES, *session.posargs, env=ONE_THREAD)
