"""Shortens the kernels' runs in Triton's interpreter."""

import os

from interpreter import hasten

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()
