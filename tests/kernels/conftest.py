"""Hastens Triton's interpreter; the backends that most tests go through."""

import os

import pytest
import torch
from interpreter import hasten

from bigru.kernels import config

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()


@pytest.fixture
def streamed(monkeypatch):
    """A hidden size whose W_hh the kernel "triton" reads in blocks: in the interpreter a small one, which takes a tenth
    of the time."""
    if torch.cuda.is_available():
        yield config.ONE_PROCESSOR + 1
        return
    monkeypatch.setattr(config, "ONE_PROCESSOR", 64)
    config.choose_triton.cache_clear()
    yield 65
    config.choose_triton.cache_clear()


@pytest.fixture(params=["torch", "reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture
def not_cudnn(backend, kernel_device):
    """For what ATen's GRU does on a CPU and cuDNN's does not."""
    if backend == "torch" and kernel_device.type == "cuda":
        pytest.skip("cuDNN's GRU cannot")


@pytest.fixture(scope="session")
def triton_device(kernel_device):
    """As `kernel_device`, for a test that is of the kernels alone."""
    pytest.importorskip("triton")
    return kernel_device
