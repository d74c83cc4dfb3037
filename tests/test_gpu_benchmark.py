"""The GPU command without a GPU: what it records when jobs fail, are killed or run late, and the planted defect."""

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

# The benchmarks are no part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import cpu, gpu, workloads
from benchmarks.gpu import SMOKE, Plan, Run
from benchmarks.workloads import MAIN, Case
from bigru.kernels.record import GEMM, NN_GRU, Check, Record, Row, read_record
from bigru.proof import machine
from bigru.proof.pool import JobFailed, JobLate, Worker
from bigru.proof.timing import compare, interleaved, settled_ms
from bigru.proof.workloads import verdict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = Case(batch=2, steps=2, hidden=16, input=4, layers=1)
FOUND = {"name": "Some GPU", "capability": [9, 0]}


def tick(work):
    """A clock that takes no time and runs the work."""
    work()
    return 2.0


def measured(case, candidate, rival=NN_GRU, modes=("forward", "training"), ratio=1.0):
    about = vars(case) | {"candidate": candidate, "rival": rival, "ours_ms": 1.0, "rival_ms": ratio}
    return [Row(**about, mode=mode, ratio=ratio, low=ratio, high=ratio) for mode in modes]


class Clock:
    """Seconds that pass only when told to."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


class Scripted:
    """A worker that answers as a function of the job says, each job taking `job_s` of a clock."""

    def __init__(self, answer=None, clock=None, job_s=0.0):
        self.answer, self.clock, self.job_s = answer or self.done, clock or Clock(), job_s
        self.jobs = []

    def run(self, seconds, function, *args):
        self.jobs.append((function.__name__, *args))
        self.clock.seconds += min(self.job_s, seconds)
        if self.job_s > seconds:
            raise JobLate(f"no answer for {seconds:.0f} s")
        return self.answer(function, *args)

    @staticmethod
    def done(function, *args):
        if function is gpu.describe:
            return FOUND, {"torch": "9.9.9"}
        if function is gpu.measure:
            return measured(*args[1:3])
        return [("kernel", 1, 0.5)] if function is gpu.profile else Check(*args[:2], "passed")

    def close(self):
        self.closed = True


@pytest.fixture
def start(tmp_path):
    """Returns a run of the smoke plan with a scripted worker, and its record as the file has it."""

    def start(worker, seconds=1e6, plan=SMOKE):
        run = Run(plan, Record("gpu", "command", FOUND, {}), seconds, tmp_path, worker, worker.clock)
        if plan is not SMOKE:
            # Hundreds of rows, which take seconds to write anew after each.
            run.save = lambda: None
        return run, lambda: read_record(run.path)

    return start


def test_a_job_that_fails_or_is_late_costs_only_its_rows(start):
    def answer(function, *args):
        if function is gpu.measure and args[2] == "resident":
            raise JobFailed("the process ended with signal SIGSEGV")
        if function is gpu.measure and args[2] == "cooperative":
            raise JobLate("no answer for 60 s; its process was ended")
        return Scripted.done(function, *args)

    run, written = start(Scripted(answer))
    run.all()
    record = written()
    assert {(row.candidate, row.status) for row in record.rows} == {
        ("auto", "measured"),
        ("triton", "measured"),
        ("resident", "failed"),
        # Late is not wrong.
        ("cooperative", "late"),
    }
    why = {row.message for row in record.rows if row.candidate == "resident"}
    assert why == {"the process ended with signal SIGSEGV"}
    assert record.complete is False
    assert set(record.profile) == {*gpu.KERNELS, NN_GRU}


def test_the_record_is_written_after_every_job(start):
    seen = []

    def answer(function, *args):
        if function is gpu.measure:
            seen.append(len(written().rows))
        return Scripted.done(function, *args)

    run, written = start(Scripted(answer))
    run.all()
    assert {after - before for before, after in itertools.pairwise(seen)} == {2}
    assert written().complete is True


def test_what_does_not_fit_is_late_and_timings_get_their_share(start):
    worker = Scripted(job_s=7.0)
    run, _ = start(worker, 100.0, Plan())
    run.all()
    statuses = [row.status for row in run.record.rows]
    assert statuses.count("measured") >= 10
    assert statuses.count("late") > 50
    assert run.record.complete is False
    assert worker.clock.seconds <= 100.0
    late = next(row.message for row in run.record.rows if row.status == "late")
    assert late.startswith(("no answer", "the minutes were"))


def test_no_case_is_timed_twice_and_every_kernel_gets_its_checks(start):
    worker = Scripted()
    run, _ = start(worker, plan=Plan())
    run.all()
    keys = [job[2:5] for job in worker.jobs if job[0] == "measure"]
    assert len(keys) == len(set(keys))
    assert {(check.name, check.candidate) for check in run.record.checks} == {
        *itertools.product(("planted defect", "memcheck"), gpu.KERNELS),
        *((f"against fp64, {precision}", kernel) for precision in Plan().precisions for kernel in gpu.KERNELS),
    }
    # Most valuable first, what compiles long last.
    assert [str(case) for case, *_ in keys[:2]] == [str(replace(MAIN, precision="default")), str(MAIN)]
    assert [rival for *_, rival in keys[-2:]] == ["torch.compile", "flashrnn"]


@pytest.mark.parametrize(("failing", "code"), [(None, 0), (gpu.planted_defect, 1), (gpu.measure, 1), (gpu.describe, 2)])
def test_exit_code(failing, code, tmp_path, capsys):
    def answer(function, *args):
        if function is failing:
            raise JobFailed("ValueError: no such luck")
        return Scripted.done(function, *args)

    worker = Scripted(answer)
    assert gpu.main(["--cpu-smoke", "--out", str(tmp_path / "new")], worker) == code
    assert worker.closed
    if code == 2:
        assert "no such luck" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    else:
        (path,) = (tmp_path / "new").iterdir()
        assert str(path) in capsys.readouterr().out
        assert read_record(path).kind == "smoke"


def test_an_interrupted_run_ends_its_worker_and_keeps_its_record(tmp_path, capsys):
    def answer(function, *args):
        if function is gpu.measure:
            raise KeyboardInterrupt
        return Scripted.done(function, *args)

    worker = Scripted(answer)
    assert gpu.main(["--cpu-smoke", "--out", str(tmp_path)], worker) == 130
    assert worker.closed
    (path,) = tmp_path.iterdir()
    assert len(read_record(path).checks) == len(gpu.KERNELS)


@pytest.mark.slow
def test_a_worker_goes_on_after_a_job_that_raises_dies_or_hangs():
    with contextlib.closing(Worker({"BENCHMARKS_TEST": "yes"})) as worker:
        assert worker.run(60.0, os.getenv, "BENCHMARKS_TEST") == "yes"
        first = worker.run(60.0, os.getpid)
        with pytest.raises(JobFailed, match="ValueError: invalid literal"):
            worker.run(60.0, int, "x")
        assert worker.run(60.0, os.getpid) == first
        with pytest.raises(JobFailed, match="exit code 3"):
            worker.run(60.0, os._exit, 3)
        with pytest.raises(JobFailed, match="SIGKILL"):
            worker.run(60.0, os.kill, 0, 9)
        second = worker.run(60.0, os.getpid)
        with pytest.raises(JobLate, match="no answer for 0 s"):
            worker.run(0.2, time.sleep, 600)
        with pytest.raises(ProcessLookupError):
            os.kill(second, 0)
        assert worker.run(60.0, os.getpid) != second
        assert "BENCHMARKS_TEST" not in os.environ


class TestMeasuring:
    def measure(self, candidate="reference", case=TINY, **options):
        clocks = dict.fromkeys(machine.GPU, tick)
        options = {"made": workloads.make} | options
        return machine.measure(case, candidate, DEVICE, 0.0, clocks=clocks, fewest=3, **options)

    def test_every_mode_and_clock_gets_its_row(self):
        rows = self.measure()
        every = [*itertools.product(("forward", "training"), ("wall", "gpu", "graph"))]
        assert [(row.mode, row.clock) for row in rows] == every
        for row in rows:
            assert (row.candidate, row.rival, row.status) == ("reference", NN_GRU, "measured")
            assert (row.ours_ms, row.rival_ms, row.ratio, row.rounds) == (2.0, 2.0, 1.0, 3)
            assert 0 < row.error < 1e-5

    @pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
    def test_a_right_kernel_is_measured_in_every_precision(self, precision):
        rows = self.measure(case=replace(TINY, precision=precision), modes=("forward",))
        assert {row.status for row in rows} == {"measured"}

    def test_a_step_of_training_is_compared_without_its_dropout(self):
        rows = self.measure(case=replace(TINY, group="training step", input=84))
        assert {(row.mode, row.status) for row in rows} == {("training", "measured")}

    def test_a_candidate_that_answers_wrong_is_not_timed(self):
        def wrong(name, case, device, **options):
            return workloads.make(name, case, device, defect=name == "reference")

        rows = self.measure(made=wrong)
        assert [(row.status, row.ours_ms) for row in rows] == [("failed", None)] * 2
        assert rows[0].message.startswith("error above 1e-05: y ")

    def test_a_rival_that_is_not_there_is_refused(self):
        rows = self.measure(rival="flashrnn")
        assert {(row.status, row.message) for row in rows} == {("refused", "flashrnn is not installed")}

    @pytest.mark.skipif(DEVICE.type == "cuda", reason="resident runs there")
    def test_a_kernel_that_refuses_is_refused_with_its_reason(self):
        (row, _) = self.measure("resident")
        assert row.status == "refused"
        assert "resident" in row.message

    def test_work_without_a_graph_keeps_its_other_figures(self):
        def no_graph(work, device):
            raise RuntimeError("not\n here")

        rows = self.measure(capture=no_graph, modes=("forward",))
        assert [row.status for row in rows] == ["measured", "measured", "refused"]
        assert rows[-1].message == "no graph: RuntimeError: not here"

    def test_what_nobody_wrote_or_nan_is_wrong(self):
        assert verdict({"y": float("nan"), "dx": 1e-9}, TINY) == "error above 1e-05: y nan"
        assert verdict({"y": 1e-9}, TINY) == ""


BARE = """
import sys
for name in ("tyro", "yaml", "matplotlib", "tabulate", "h5py", "safetensors"):
    sys.modules[name] = None
from benchmarks import gpu
from bigru.proof import machine
from benchmarks.workloads import make
case = gpu.SMOKE.main
device, clocks = machine.torch.device("cpu"), machine.TRIAL
layer = machine.measure(case, "torch", device, 0.0, clocks=clocks, fewest=2)
step = machine.measure(gpu.replace(case, group="training step"), "torch", device, 0.0, made=make)
print({row.status for row in layer}, [(row.status, "pip install" in row.message) for row in step])
"""


@pytest.mark.slow
def test_a_gpu_machine_needs_no_packages_of_the_forecaster():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{'measured'} [('refused', True)]\n", "")


def test_the_planted_defect_is_noticed():
    check = gpu.planted_defect("planted defect", "triton", TINY, DEVICE.type)
    assert check.status == "passed", check
    assert check.message.startswith("noticed: error above 1e-05: y ")


def test_rounds_interleave_and_take_turns_in_going_first():
    order = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(works, 0.0, lambda work: work() or 1.0, fewest=4)
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 4)
    assert order[-12:] == list("abcbcacababc")
    figures = compare([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert figures == {"ours_ms": 2.0, "rival_ms": 2.0, "ratio": 1.0, "low": 0.75, "high": 1.5, "rounds": 3}
    assert compare([1.0, 2.0], [9.0, 2.0])["low"] == 3.0


def test_the_summary_ends_with_what_is_proven_and_the_main_ratios():
    record = Record("gpu", "command", FOUND, {}, rows=measured(MAIN, "resident", ratio=1.5))
    lines = gpu.summary(record).splitlines()
    assert "  layer fp32 H=128 B=64 T=60: resident" in lines
    assert lines[-1].startswith("resident beside nn.GRU, layer fp32 B=64 T=60 H=128 forward")


def test_the_cpu_command_goes_on_with_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "jobs", functools.partial(cpu.jobs, TINY))
    ticks = itertools.count()
    record, found = Record("cpu", "command", FOUND, {}, complete=False), []
    for _ in range(2):
        # The clock is read four times a turn: each has the seconds for one job.
        cpu.run(record, tmp_path, "torch", [1], 0.0, 2.0, lambda: float(next(ticks)))
        record = read_record(tmp_path / record.name)
        found.append([(row.mode, row.batch, row.status, row.threads) for row in record.rows])
    assert found[0] == [(mode, 1, "measured", 1) for mode in ("forward", "training")]
    assert found[1] == found[0] + [(mode, 8, "measured", 1) for mode in ("forward", "training")]
    assert record.complete is False


def test_onnxruntime_is_a_rival_of_the_forward_pass():
    pytest.importorskip("onnxruntime")
    options = {"rival": "onnxruntime", "modes": ("forward",), "made": workloads.make}
    (row,) = machine.measure(TINY, "torch", torch.device("cpu"), 0.0, **options)
    assert (row.status, row.rival) == ("measured", "onnxruntime")


def test_the_machine_s_own_rate_is_of_as_many_products():
    case, device = replace(TINY, batch=64, steps=60, hidden=64), torch.device("cpu")
    counts = []
    for name in ("reference", GEMM):
        with FlopCounterMode(display=False) as counter:
            workloads.make(name, case, device).works["forward"]()
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_a_core_is_kept_busy_no_longer_than_the_block():
    with cpu.keep_a_core_busy() as process:
        assert process.poll() is None
    assert process.returncode is not None


@pytest.mark.parametrize(("long_ms", "runs"), [(1e9, 2), (0.0, 1)])
def test_a_short_run_on_a_cpu_is_timed_warm(long_ms, runs):
    calls = []
    assert settled_ms(lambda: calls.append(1), long_ms) > 0
    assert len(calls) == runs
