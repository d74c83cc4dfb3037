"""A plugin for pytest that hides the C extension: `PYTHONPATH=tests python -m pytest -p without_extension`."""

import sys

for instructions in ("avx512", "avx2", "base"):
    for dtype in ("float32", "float64"):
        sys.modules[f"bigru.kernels._cpu_{instructions}_{dtype}"] = None  # what an import of it then finds
