"""What can be done with the project: `python -m nox -s NAME`; without -s, what CI does.

Each session makes its own environment and installs the versions pinned in constraints.txt.
"""

import os
import shutil

import nox

nox.options.sessions = ["lint", "tests", "kernels", "resources", "bench", "gpu_smoke"]
nox.options.error_on_missing_interpreters = True

CONSTRAINTS = "constraints.txt"


def install(session: nox.Session, *extra: str, constraints: str = CONSTRAINTS) -> None:
    session.install("-c", constraints, "-e", ".[test]", *extra)


@nox.session
def train(session: nox.Session) -> None:
    """Trains the forecaster (arguments after -- go to bigru.train) and writes the performance document."""
    install(session)
    # A network this small gains a fifth from a second thread on an idle machine, and loses most of its speed to it on
    # a busy one, where the threads wait for one another.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    session.run("python", "-m", "bigru.train", *session.posargs, env={"OMP_NUM_THREADS": threads})


@nox.session
def tests(session: nox.Session) -> None:
    """Runs the test suite; the kernels in Triton's interpreter where there is no GPU."""
    install(session)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff and mypy."""
    install(session, "ruff", "mypy", "nox", "types-PyYAML")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def kernels(session: nox.Session) -> None:
    """The kernels' tests on the oldest supported triton (a GPU machine's); `tests` runs them on the newest."""
    install(session)
    # Its interpreter needs numpy below 2.4.
    session.install("triton==3.6.0", "numpy<2.4")
    session.run("python", "-m", "pytest", "tests/kernels", *session.posargs)
    session.run("python", "-m", "bigru.kernels.resources", env={"TRITON_INTERPRET": "0"})


@nox.session
def resources(session: nox.Session) -> None:
    """Compiles every kernel for sm_80, sm_90 and sm_100, without a GPU; fails if one spills or does not fit."""
    install(session)
    session.run("python", "-m", "bigru.kernels.resources", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks: the full comparison on a GPU, a small one on a CPU, which says so."""
    install(session)
    session.run("python", "-m", "pytest", "benchmarks", *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Proves every kernel on this machine's GPU and times it beside nn.GRU; at most nine minutes, one JSON file."""
    install(session)
    session.run("python", "-m", "benchmarks.gpu", *(session.posargs or ["--out", "benchmarks/results"]))


@nox.session
def gpu_smoke(session: nox.Session) -> None:
    """The code of `gpu` at tiny sizes on a CPU."""
    install(session)
    out = ["--out", session.create_tmp()]
    session.run(
        "python", "-m", "benchmarks.gpu", "--cpu-smoke", *(session.posargs or out), env={"OMP_NUM_THREADS": "1"}
    )


@nox.session(python="3.12" if shutil.which("python3.12") else None, default=False)
def tests_lowest(session: nox.Session) -> None:
    """The test suite at the lower bounds of pyproject.toml; installs a CUDA build of torch, several gigabytes."""
    install(session, constraints="constraints-lowest.txt")
    session.run("python", "-m", "pytest", *session.posargs)
