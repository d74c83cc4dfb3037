"""Kernels run on the GPU if there is one, else in Triton's interpreter; the tests are the same."""

import os

import pytest
import torch

# cuBLAS reads this when it starts; `poisoned` asks for deterministic algorithms, which refuse to run without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# No proof of this machine's user decides what is tested.
os.environ["XDG_CACHE_HOME"] = "/nonexistent"

# Triton reads this when a kernel is defined, so it is set before any test imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# nn.GRU is what kernels are held to: it computes in fp32.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where the Triton kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned():
    """Fills every uninitialised buffer with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def blank_pictures(monkeypatch):
    """Drawing takes most of a report's time, and tests/report/test_figures.py looks at the pictures."""
    monkeypatch.setattr("bigru.report.figures.png", lambda figure: b"")
