"""`bigru.prove`: what it finds wrong, what it records, and what "auto" makes of the record."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import bigru
from bigru.kernels import proven, registry
from bigru.kernels.choice import forget
from bigru.kernels.config import H100, Call, Device
from bigru.kernels.cpu import KERNEL
from bigru.kernels.record import NN_GRU, Check, Record, Row, read_record
from bigru.kernels.scan import ScanKernel
from bigru.proof import prover
from bigru.proof.checks import faults
from bigru.proof.pool import JobFailed, JobLate
from bigru.proof.prover import grid, run

CPU = torch.device("cpu")
CALL = Call(H100, torch.float32, 100, steps=60, batch=8)


class Wrong(ScanKernel):
    """The PyTorch loop with a defect."""

    def __init__(self, defect):
        self.defect, self.calls = defect, 0

    def forward(self, operands, config=None):
        super().forward(operands, config)
        self.calls += 1
        if self.defect == "unwritten":
            operands.h_n[0, 0, 0] = torch.nan
        elif self.defect == "another each time":
            operands.y.mul_(1 + 1e-7 * self.calls)
        elif self.defect == "forward":
            operands.y[-1, 0] += 0.1

    def backward(self, operands, config=None):
        super().backward(operands, config)
        if self.defect == "backward":
            operands.dq.neg_()


@pytest.mark.parametrize(
    ("defect", "found"),
    [
        ("unwritten", "H=5: error of h_n inf"),
        ("another each time", "H=5: y differs from run to run"),
        ("forward", "H=5: error of y"),
        ("backward", "H=5: error of dw_hh"),
    ],
)
def test_a_defect_is_found(defect, found):
    assert any(fault.startswith(found) for fault in faults(Wrong(defect), torch.float32, "fp32", CPU, [5]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", registry.KERNELS)
def test_nothing_is_found_in_what_is_right(name, precision, kernel_device):
    device = "cpu" if name in ("cpu", "scan") else kernel_device.type
    found = prover.check("check", name, precision, device, [160 if name == "cooperative" else 7])
    if found.status == "not available":
        pytest.skip(found.message)
    assert (found.status, found.message) == ("passed", "")


def test_what_refuses_every_size_is_not_called_right():
    pytest.importorskip("triton")
    found = prover.check("check", "resident", "fp32", "cpu", [19])
    assert (found.status, found.message[:22]) == ("not available", "the input is on cpu, a")


def rows(kernel, ratio=2.0, ours=1.0, **changes):
    about = {"group": "layer", "batch": 64, "steps": 10, "hidden": 128, "clock": "wall"} | changes
    figures = {"ours_ms": ours, "rival_ms": ratio * ours, "ratio": ratio, "low": ratio, "high": ratio}
    return [Row(**about, mode=mode, candidate=kernel, rival=NN_GRU, **figures) for mode in ("forward", "training")]


def chosen(rows, checks=(), **changes):
    record = Record("proof", "", {"name": "card"}, {}, rows=rows, checks=list(checks))
    kernels = [replace(registry.get("triton"), interpreted=False), registry.get("resident")]
    call = replace(CALL, **changes)
    return registry.choose("auto", call, kernels, proven.proofs_of(record, "card.json"))


class TestAuto:
    pytestmark = pytest.mark.filterwarnings("ignore")

    def test_takes_the_fastest_of_those_that_are_proven(self):
        pytest.importorskip("triton")
        both = rows("triton", ours=2.0) + rows("resident", ours=1.0)
        assert chosen(both).backend == "resident"
        assert "H=128 B=64 T=10: resident 2.0, triton 2.0 (card.json)" in chosen(both).why
        # A packed call in fp32 at H=100 is not resident's.
        ragged = [replace(row, group="ragged") for row in both]
        assert chosen(both + ragged, varlen=True).backend == "triton"
        # One slow mode, clock or failed check is enough not to be taken.
        assert chosen(both + rows("resident", 0.9, clock="gpu")).backend == "triton"
        assert chosen([both[0], replace(both[1], ratio=0.9)]).backend == "torch"
        assert chosen(both, [Check("against fp64", "resident", "failed")]).backend == "triton"
        assert chosen(both[:1]).backend == "torch"  # forward alone

    @pytest.mark.parametrize(
        ("change", "backend"),
        [
            ({"hidden": 128, "batch": 64, "steps": 10}, "triton"),
            ({"batch": 65}, "torch"),
            ({"hidden": 129}, "torch"),
            ({"steps": 9}, "torch"),
            ({"steps": 1000}, "triton"),
            ({"batch": 1}, "torch"),  # for which B=1 stands, where it was slower
            ({"precision": "tf32"}, "torch"),
            ({"dtype": torch.bfloat16}, "torch"),
            ({"varlen": True}, "torch"),
            ({"steps": None, "batch": None}, "torch"),  # a graph for every B
            ({"hidden": 64, "steps": None, "batch": None}, "triton"),
        ],
    )
    def test_the_nearest_size_stands_for_a_call(self, change, backend):
        pytest.importorskip("triton")
        known = rows("triton") + rows("triton", 0.8, batch=1) + rows("triton", hidden=64)
        assert chosen(known, **change).backend == backend

    def test_a_kernel_of_a_cpu_that_failed_is_not_taken_by_its_rule(self):
        on_cpu = replace(CALL, device=Device("cpu"))
        record = Record("proof", "", {"name": "cpu"}, {}, checks=[Check("against fp64", "cpu", "failed")])
        assert registry.choose("auto", on_cpu, [KERNEL], proven.proofs_of(record, "")).backend == "torch"


class TestFile:
    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = proven.proof_path(Device("cpu"))
        path.parent.mkdir()
        yield path
        forget()

    def find(self):
        forget()
        return proven.proofs(Device("cpu"))

    def test_a_fresh_one_is_read(self, path):
        Record("proof", "", *proven.keys(Device("cpu")), rows=rows("cpu", threads=1)).write(path)
        assert self.find().ranked["layer", "fp32", 1] == {(128, 64, 10): (("cpu", 2.0),)}

    def test_a_stale_foreign_or_torn_one_is_named_and_ignored(self, path, caplog):
        machine, versions = proven.keys(Device("cpu"))
        for made, said in (
            (Record("proof", "", machine, versions | {"torch": "1.0"}), "torch 1.0, not"),
            (Record("proof", "", {"name": "another"}, versions), "name another, not"),
        ):
            made.write(path)
            assert self.find() is None
            assert f"{path} is ignored, made with {said}" in caplog.text
        path.write_text("{")
        assert self.find() is None
        assert f"{path} is ignored: JSONDecodeError" in caplog.text

    def test_the_driver_says_its_version(self, tmp_path):
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
        assert proven.driver(tmp_path / "version") == "535.104.05"
        assert proven.driver(tmp_path / "none") == "unknown"


class Scripted:
    """A worker that answers as a function says."""

    def __init__(self, answer):
        self.answer, self.jobs = answer, []

    def run(self, seconds, function, *args):
        self.jobs.append((function, *args))
        return self.answer(function, *args)

    def close(self):
        self.closed = True


def test_what_crashes_is_wrong_and_what_is_late_unproven(capsys):
    def answer(function, *args):
        if function is prover.check:
            name, kernel, *_ = args
            if kernel == "hangs":
                raise JobLate("no answer")
            return Check(name, kernel, "failed" if kernel == "wrong" else "passed")
        case, kernel, *_ = args
        if kernel == "crashes":
            raise JobFailed("SIGSEGV")
        if case.batch == 8:
            raise JobLate("no answer")
        return rows(kernel, batch=case.batch, hidden=case.hidden, steps=case.steps, group=case.group)

    record, worker = Record("proof", "", {"name": "card"}, {}), Scripted(answer)
    cases = list(grid([128], [64, 8], [60], ["fp32"]))
    run(record, cases, ["good", "wrong", "hangs", "crashes"], "cuda", 1, lambda: worker, lambda: 10.0)
    assert worker.closed
    assert {check.candidate: check.status for check in record.checks} == {
        "good": "passed",
        "wrong": "failed",
        "hangs": "not available",
        "crashes": "passed",
    }
    assert {(row.candidate, row.batch, row.status) for row in record.rows} == {
        ("good", 64, "measured"),
        ("crashes", 64, "failed"),
        ("crashes", 8, "failed"),
    }
    assert record.complete is False
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    sizes = {name for (name, *_), of in proven.proofs_of(record, "").ranked.items() if any(of.values())}
    assert sizes == {"layer", "ragged"}


@pytest.mark.slow
def test_from_the_command_to_auto(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    code = """
import bigru, torch
record = bigru.prove("--hidden", "8", "--batch", "2", "--steps", "3")
assert {row.group for row in record.rows} == {"layer", "ragged"}
bigru.prove("--hidden", "8", "--batch", "3", "--steps", "3")
from bigru.kernels import proven
from bigru.kernels.config import Device
found = proven.proofs(Device("cpu")).ranked["layer", "fp32", 1]
assert set(found) == {(8, 2, 3), (8, 3, 3)}, found
"""
    if KERNEL.instructions == "none":
        pytest.skip("the CPU kernel is not built")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "bigru").iterdir()
    assert read_record(path).kind == "proof"
    assert str(path) in done.stdout


def test_the_function_is_there_once_its_module_is_imported():
    import bigru.prove as module

    assert callable(bigru.prove)
    assert bigru.prove is module
