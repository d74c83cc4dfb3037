"""`BiGRU` in DistributedDataParallel and FSDP2: two gloo processes, half of a batch each, give one process's gradients.

pytest starts this file as a program, which starts the processes.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from bigru import BiGRU

PROCESSES = 2
# The interpreter of triton 3.6 takes arrays of one element for numbers, which numpy refuses from 2.4 on.
INTERPRETS = find_spec("triton") and (TorchVersion(version("triton")) >= "3.7" or TorchVersion(np.__version__) < "2.4")
BACKENDS = ["torch"] + (["triton"] if INTERPRETS else [])


class Model(nn.Module):
    """A GRU and a head, whose forward is the loss."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.gru = BiGRU(3, 4, batch_first=True, backend=backend)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0]).float().square().mean()


def wrapped(model, how, mesh):
    """The model in DDP, or sharded: the GRU by itself, then the rest."""
    if how == "ddp":
        return DistributedDataParallel(model)
    policy = MixedPrecisionPolicy()
    if how == "fsdp in bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.gru, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def worker(rank, store):
    """Two steps of each kind of parallelism on this process's rows, held to one process's steps on all rows."""
    from interpreter import hasten
    from support import error

    hasten()

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(1)
    batches = torch.randn(2, 4, 2, 3)
    for backend in BACKENDS:
        for how, tolerance in (("ddp", 1e-5), ("fsdp", 1e-5), ("fsdp in bf16", 3e-2)):
            alone, model = Model("reference"), Model(backend)
            parallel = wrapped(model, how, mesh)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (alone, parallel)]
            for x in batches:
                for module, rows in ((alone, x), (parallel, x.chunk(PROCESSES)[rank])):
                    module.zero_grad()
                    module(rows).backward()
                for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
                    gradient = ours.grad if how == "ddp" else ours.grad.full_tensor()
                    assert gradient.dtype == torch.float32
                    assert error(gradient, theirs.grad) < tolerance, (backend, how)
                for optimizer in optimizers:
                    optimizer.step()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_give_the_gradients_of_one(tmp_path):
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    # On the CPU also where there is a GPU: gloo serves it, and two processes would share one.
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    spawn(worker, (sys.argv[1],), PROCESSES)
