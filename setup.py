"""Builds the optional C extension of the backend "cpu"; everything else is in pyproject.toml.

Where it cannot be built the package installs without it. In a checkout: `python setup.py build_ext --inplace`.
"""

import platform

from setuptools import Extension, setup

# One object for each instruction set, chosen at load by what the processor has, and none for the build machine's own.
# The flags name the very features that bigru.kernels.cpu asks for.
INSTRUCTIONS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTIONS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTIONS["avx512"] = ["-mavx512f", "-mavx512dq", "-mfma"]
# Products and sums are fused where the processor can, but nothing is reordered: NaN and infinity stay what they are.
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-pthread"]

setup(
    ext_modules=[
        Extension(
            f"bigru.kernels._cpu_{name}_{dtype}",
            ["bigru/kernels/cpu_recurrence.c"],
            depends=["bigru/kernels/cpu_tiles.h"],
            define_macros=[("MODULE", f"_cpu_{name}_{dtype}"), *([("DOUBLE", None)] if dtype == "float64" else [])],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
        for dtype in ("float32", "float64")
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
