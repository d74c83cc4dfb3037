"""Hastens Triton's interpreter; the backends that most tests go through."""

import os

import pytest
from interpreter import hasten

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()


@pytest.fixture(params=["torch", "reference", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="session")
def triton_device(kernel_device):
    """As `kernel_device`, for a test that is of the kernels alone."""
    pytest.importorskip("triton")
    return kernel_device
