"""Exports a BiGRU to ONNX and runs it in onnxruntime at a batch and a length of its own.

python -m pip install '.[onnx]' onnxruntime
python examples/onnx_export.py [FILE]
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from bigru import BiGRU, export_onnx


def main(path: str = "bigru.onnx") -> None:
    torch.manual_seed(0)
    gru = BiGRU(84, 32, num_layers=2, batch_first=True).eval()
    export_onnx(gru, Path(path))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    print("inputs: ", *((value.name, value.shape) for value in session.get_inputs()))
    print("outputs:", *((value.name, value.shape) for value in session.get_outputs()))

    x = torch.randn(3, 25, 84)
    with torch.inference_mode():
        y, _ = gru(x)
    name = session.get_inputs()[0].name
    theirs = session.run(None, {name: x.numpy()})[0]
    print(f"largest difference to torch: {np.abs(theirs - y.numpy()).max():.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
