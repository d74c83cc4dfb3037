"""The GPU command without a GPU: what it records when workers fail, are killed or run late, and the planted defect."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

pytest.importorskip("triton")

# The benchmarks are no part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import correctness, gpu, plan, rivals, worker
from benchmarks import gpu_record as record
from benchmarks.gpu_record import Budget, Record, floor_ms, summary, write_whole
from benchmarks.machine import Cpu, Gpu
from benchmarks.plan import FULL, SMOKE, Job, Plan, Shape, layer_job, timing_rows
from benchmarks.supervisor import Post, Process, WorkerLost, carry_out_all
from benchmarks.timing import Contestant, figures_of, race
from bigru import BiGRU

MACHINE = {
    "card": "Some GPU",
    "capability": [9, 0],
    "processors": 132,
    "memory_gib": 80.0,
    "driver": "1",
    "cpu": "some",
    "cpu_cores": 2,
}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class Scripted:
    """A worker that does what the test's function says: a list of answers to an order, or None where it dies."""

    def __init__(self, answer, clock=None):
        self.answer, self.clock, self.answers = answer, clock, []
        self.closed = False

    def send(self, order):
        self.answers = list(self.answer(order))

    def receive(self, timeout):
        answer = self.answers.pop(0)
        if isinstance(answer, float):
            if answer > timeout:
                self.clock.seconds += timeout
                raise WorkerLost(f"no answer for {timeout:.0f} s")
            self.clock.seconds += answer
            return self.receive(timeout)
        if answer is None:
            raise WorkerLost("the process ended with signal SIGKILL")
        return answer

    def close(self):
        self.closed = True


def done(order):
    """Every part measured or passed."""
    for part, rows in order["parts"].items():
        yield {"start": part}
        found = {"status": "passed"}
        if "path" in rows[0]:
            found = {"status": "measured"} | dict.fromkeys(record.FIGURES, 1.0)
        yield {"part": part, "rows": [row | found for row in rows]}
    yield {"done": True}


@pytest.fixture
def budget():
    return Budget(100.0, Clock())


@pytest.fixture
def kept(tmp_path, budget):
    header = {"schema": 1, "kind": "gpu", "machine": MACHINE, "versions": {}}
    return Record(tmp_path / "card-2026-01-01.json", header, budget.spent)


def on_disk(kept):
    return json.loads(kept.path.read_text())


def statuses(kept, section="timings"):
    return {row.get("path", row.get("kernel")): row["status"] for row in on_disk(kept)[section]}


def machine():
    return Gpu() if torch.cuda.is_available() else Cpu()


class Heard(list):
    """A report's answers."""

    def rows(self):
        return [row for answer in self for row in answer.get("rows", [])]


def serve(do, parts, **args):
    heard = Heard()
    where = machine()
    worker.serve({"do": do, "parts": parts, "args": args}, where, parts.Report(parts, where, heard.append))
    return heard


class TestTheFile:
    def test_is_whole_after_a_kill_while_it_is_written(self, kept, monkeypatch):
        kept.add("checks", [{"name": "memcheck", "kernel": "triton", "status": "passed", "message": None}])
        kept.save()
        before = kept.path.read_bytes()
        kept.add("checks", [{"name": "racecheck", "kernel": "triton", "status": "passed", "message": None}])

        def killed(*_):
            raise KeyboardInterrupt

        # As late as can be: everything is written, and only the rename is missing.
        monkeypatch.setattr(record.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.save()
        assert kept.path.read_bytes() == before
        assert on_disk(kept)["complete"] is False

    def test_is_written_after_every_job(self, kept, budget):
        seen = []

        def answer(order):
            seen.append(len(on_disk(kept)["timings"]) if kept.path.exists() else 0)
            return done(order)

        jobs = [layer_job(Shape(batch=batch), "fp32", ("nn.GRU",), 1.0) for batch in (1, 2, 3)]
        assert carry_out_all(jobs, [Post(lambda: Scripted(answer))], kept, budget) == []
        assert seen == [0, 2, 4]
        assert len(on_disk(kept)["timings"]) == 6

    def test_holds_no_numbers_that_json_has_not(self, tmp_path):
        path = tmp_path / "file.json"
        write_whole(path, {"a": float("nan"), "b": [float("inf"), 1.5]})
        assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}


class TestWorkersThatFail:
    def job(self, *paths):
        return layer_job(Shape(), "fp32", paths or ("nn.GRU", "triton", "resident"), 1.0)

    def test_a_part_that_kills_its_worker_costs_no_other(self, kept, budget):
        hired = []

        def answer(order):
            for line in done(order):
                yield line
                if line.get("start") == "triton":
                    yield None

        def hire():
            hired.append(Scripted(answer))
            return hired[-1]

        carry_out_all([self.job()], [Post(hire)], kept, budget)
        assert statuses(kept) == {"nn.GRU": "measured", "triton": "failed", "resident": "measured"}
        assert "SIGKILL" in next(row["message"] for row in kept.rows["timings"] if row["path"] == "triton")
        assert len(hired) == 2
        assert hired[0].closed

    def test_one_that_dies_with_all_parts_begun_fails_them_all(self, kept, budget):
        answer = lambda order: [*({"start": part} for part in order["parts"]), {"start": None}, None]  # noqa: E731
        carry_out_all([self.job()], [Post(lambda: Scripted(answer))], kept, budget)
        assert set(statuses(kept).values()) == {"failed"}

    def test_one_that_cannot_even_start_fails_them_all(self, kept, budget):
        carry_out_all([self.job()], [Post(lambda: Scripted(lambda order: [None]))], kept, budget)
        assert set(statuses(kept).values()) == {"failed"}

    def test_a_part_that_leaves_the_device_dead_costs_no_other(self, kept, budget):
        def answer(order):
            for line in done(order):
                if line.get("part") == "triton":
                    failed = [row | {"status": "failed", "message": "illegal access"} for row in line["rows"]]
                    yield {"part": "triton", "rows": failed}
                    yield None
                yield line

        carry_out_all([self.job()], [Post(lambda: Scripted(answer))], kept, budget)
        assert statuses(kept) == {"nn.GRU": "measured", "triton": "failed", "resident": "measured"}
        assert [row["message"] for row in kept.rows["timings"] if row["path"] == "triton"] == ["illegal access"] * 2

    def test_a_hanging_part_is_given_up(self, kept, budget):
        answer = lambda order: [{"start": "triton"}, 1e9]  # noqa: E731
        carry_out_all([self.job("triton")], [Post(lambda: Scripted(answer, budget._now))], kept, budget)
        (row, _) = kept.rows["timings"]
        assert (row["status"], row["message"]) == ("failed", "no answer for 60 s")

    def test_a_kernel_found_wrong_is_not_timed(self, kept, budget):
        (wrong,) = next(FULL.correctness()).parts["T=5 B=17 bias=True"]
        kept.add("correctness", [wrong | {"status": "failed", "message": "error above 1e-05: y 1.0e+00"}])
        asked = []

        def answer(order):
            asked.extend(order["parts"])
            return done(order)

        carry_out_all([self.job()], [Post(lambda: Scripted(answer))], kept, budget)
        assert asked == ["nn.GRU", "resident"]
        assert statuses(kept)["triton"] == "failed"
        assert "T=5 B=17: error above" in kept.rows["timings"][0]["message"]
        # Wrong in fp32 says nothing of bf16.
        assert kept.wrong("triton", 128, "bfloat16", "-") is None

    def test_a_real_process_answers_and_dies(self):
        process = Process({"TRITON_INTERPRET": "1"}, cpu=True)
        try:
            process.send({"do": "no such job", "parts": {"a": [{}]}, "args": {}})
            # What is raised inside a part leaves the worker alive.
            answers = [process.receive(120.0) for _ in range(3)]
            assert answers[0] == {"start": "a"}
            assert answers[1]["rows"][0]["message"].startswith("KeyError")
            assert answers[2] == {"done": True}
            os.kill(process._process.pid, 9)
            with pytest.raises(WorkerLost, match="SIGKILL"):
                process.receive(60.0)
        finally:
            process.close()


class TestTheBudget:
    def test_what_does_not_fit_is_out_of_time(self, kept, budget, monkeypatch):
        def answer(order):
            lines = list(done(order))
            return [*lines[:-1], 7.0, lines[-1]]

        small = Plan(hidden=(128,), widths=(64,), batches=(), lengths=(), edges=(), main_only=())
        posts = [Post(lambda: Scripted(answer, budget._now)) for _ in range(2)]
        gpu.run(small, kept, budget, posts[0], posts[1:])
        assert budget.left() > -60
        written = on_disk(kept)
        assert written["complete"] is False
        late = [row for row in written["timings"] if row["status"] == "out of time"]
        assert late
        assert all("minutes were over" in row["message"] for row in late)
        # Timings got their share although the checks alone would have filled the time.
        assert [row for row in written["timings"] if row["status"] == "measured"]
        assert [row for row in written["left_out"] if row["status"] == "out of time"]

    def test_a_job_cut_short_by_the_end_is_out_of_time(self, kept):
        budget = Budget(30.0, Clock())
        answer = lambda order: [{"start": "triton"}, 1e9]  # noqa: E731
        job = layer_job(Shape(), "fp32", ("triton",), 1.0)
        carry_out_all([job], [Post(lambda: Scripted(answer, budget._now))], kept, budget)
        assert statuses(kept) == {"triton": "out of time"}
        assert budget.left() == 0

    def test_nothing_is_begun_within_the_reserve(self, kept, budget):
        budget._now.seconds = 96.0
        job = layer_job(Shape(), "fp32", ("triton",), 1.0)
        assert carry_out_all([job], [Post(lambda: pytest.fail("hired"))], kept, budget, reserve_s=5.0) == [job]

    def test_rivals_that_compile_too_long_are_out_of_time(self, kept, budget):
        job = next(FULL.slow_rivals())
        answer = lambda order: [{"start": "torch.compile"}, 1e9]  # noqa: E731
        carry_out_all([job], [Post(lambda: Scripted(answer, budget._now))], kept, budget)
        assert statuses(kept) == {"torch.compile": "out of time"}

    def test_an_interrupted_run_ends_its_workers(self, kept, budget):
        hired = Scripted(None)

        def answer(order):
            raise KeyboardInterrupt

        hired.answer = answer
        with pytest.raises(KeyboardInterrupt):
            carry_out_all([layer_job(Shape(), "fp32", ("triton",), 1.0)], [Post(lambda: hired)], kept, budget)
        assert hired.closed


def grid_row(hidden=16, kernel="triton", mode="fp32", size=(3, 9)):
    return SMOKE._grid_row(kernel, mode, hidden, *size, True)


class TestCorrectness:
    def test_a_right_kernel_passes_in_every_mode(self):
        for mode in plan.PRECISIONS:
            (row,) = serve("correctness", {"a": [grid_row(mode=mode)]}).rows()
            assert row["status"] == "passed", row["message"]
            assert row["deterministic"] is True
            assert set(row["errors"]) == {"y", "h_n", "dgi", "dw_hh", "db_hn", "dh0"}

    def test_the_planted_defect_is_caught(self):
        (row,) = serve("planted defect", {"a": [{"name": "planted defect"} | grid_row()]}).rows()
        assert row["status"] == "passed"
        assert row["message"].startswith("noticed: error above")

    def test_a_comparison_that_notices_nothing_is_a_failure(self, monkeypatch):
        monkeypatch.setattr(correctness, "verdict", lambda *_: None)
        (row,) = serve("planted defect", {"a": [{"name": "planted defect"} | grid_row()]}).rows()
        assert row["status"] == "failed"

    def test_a_wrong_kernel_fails(self, monkeypatch):
        real = correctness.kernel
        monkeypatch.setattr(correctness, "kernel", lambda *a: lambda gi, *rest: real(*a)(gi * 1.01, *rest))
        (row,) = serve("correctness", {"a": [grid_row()]}).rows()
        assert row["status"] == "failed"
        assert "y" in row["message"]

    def test_an_element_nobody_wrote_fails(self, monkeypatch):
        def leaves_one_out(*_):
            def run(gi, w_hh, b_hn, h0):
                y, h_n = correctness.fused_gru_recurrence(gi, w_hh, b_hn, h0, "fp32")
                return torch.cat([y[:-1], torch.empty_like(y[-1:]) + 0 * y[-1:]]), h_n

            return run

        monkeypatch.setattr(correctness, "kernel", leaves_one_out)
        (row,) = serve("correctness", {"a": [grid_row()]}).rows()
        assert row["status"] == "failed"
        assert row["errors"]["y"] is None

    def test_a_kernel_that_differs_from_run_to_run_fails(self, monkeypatch):
        real, calls = correctness.kernel, []

        def drifts(*a):
            def run(gi, *rest):
                calls.append(0)
                return real(*a)(gi * (1 + 1e-7 * len(calls)), *rest)

            return run

        monkeypatch.setattr(correctness, "kernel", drifts)
        (row,) = serve("correctness", {"a": [grid_row()]}).rows()
        assert (row["status"], row["message"]) == ("failed", "two runs differ")

    def test_a_kernel_that_raises_is_a_failed_row_with_its_message(self, monkeypatch):
        def broken(*_, **__):
            raise ValueError("no such\n  luck")

        monkeypatch.setattr(correctness, "fused_gru_recurrence", broken)
        rows = serve("correctness", {"a": [grid_row()], "b": [grid_row(size=(1, 1))]}).rows()
        assert [row["status"] for row in rows] == ["failed", "failed"]
        assert rows[0]["message"] == "ValueError: no such luck"

    def test_a_refused_kernel_is_a_refused_row(self, monkeypatch):
        monkeypatch.setattr(Cpu, "refusal", lambda *_: "too wide")
        monkeypatch.setattr(Gpu, "refusal", lambda *_: "too wide")
        (row,) = serve("correctness", {"a": [grid_row()]}).rows()
        assert (row["status"], row["message"]) == ("refused", "too wide")
        rows = serve(
            "recurrence",
            {"triton": timing_rows("recurrence", "triton", SMOKE.main, "fp32", ("forward", "backward"))},
            seconds=0.0,
        ).rows()
        assert [row["status"] for row in rows] == ["refused", "refused"]
        assert all(row["gpu_ms"] is None for row in rows)

    @pytest.mark.parametrize("mode", plan.PRECISIONS)
    def test_a_ragged_batch_is_right_in_every_mode(self, mode):
        (row,) = serve("ragged batch", {"a": [{"name": "ragged batch"} | grid_row(mode=mode)]}).rows()
        assert row["status"] == "passed", row["message"]

    def test_a_ragged_batch_that_is_not_reversed_from_each_end_fails(self, monkeypatch):
        forward = BiGRU.forward

        def whole(self, packed):
            x, lengths = pad_packed_sequence(packed)
            y, h_n = forward(self, x)
            return pack_padded_sequence(y, lengths, enforce_sorted=False), h_n

        monkeypatch.setattr(correctness.BiGRU, "forward", whole)
        (row,) = serve("ragged batch", {"a": [{"name": "ragged batch"} | grid_row()]}).rows()
        assert (row["status"], row["message"][:11]) == ("failed", "error above")

    def test_graph_capture_compares_new_numbers(self, monkeypatch):
        (row,) = serve("graph capture", {"a": [{"name": "graph capture"} | grid_row()]}).rows()
        assert row["status"] == "passed", row["message"]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="what a graph on a CPU would keep cannot be faked on a GPU")
    def test_a_graph_that_keeps_its_old_numbers_fails(self, monkeypatch):
        monkeypatch.setattr(Cpu, "capture", lambda self, work: work() or (lambda: None))
        (row,) = serve("graph capture", {"a": [{"name": "graph capture"} | grid_row()]}).rows()
        assert row["status"] == "failed"


class TestTimings:
    """No test times anything: the machine's clock is replaced."""

    @pytest.fixture(autouse=True)
    def no_clock(self, monkeypatch):
        for kind in (Cpu, Gpu):
            monkeypatch.setattr(kind, "time_ms", lambda self, figure, work, lead=0.0: [work(), 2.0][1])
        monkeypatch.setattr(
            rivals,
            "race",
            lambda m, contestants, seconds: {
                c.name: {figure: [1.0, 2.0, 3.0] for figure in c.works} for c in contestants
            },
        )

    def parts(self, *paths):
        tiny = Shape(steps=2, batch=2, input=4, hidden=16, layers=1)
        return layer_job(tiny, "fp32", paths, 0.0).parts

    def test_every_path_gets_its_three_figures(self):
        rows = serve("layer", self.parts("nn.GRU", "triton"), seconds=0.0).rows()
        assert [(row["path"], row["work"]) for row in rows] == [
            (path, work) for path in ("nn.GRU", "triton") for work in ("forward", "forward+backward")
        ]
        for row in rows:
            assert row["status"] == "measured"
            assert [row[figure] for figure in record.FIGURES] == [2.0, 2.0, 2.0]
            assert 0 < row["error"] < 1e-5

    def test_a_path_that_answers_wrong_is_not_timed(self, monkeypatch):
        real = rivals.make_path

        def wrong(path, nn_gru, mode):
            gru = real(path, nn_gru, mode)
            if path == "triton":
                with torch.no_grad():
                    gru.bias_hh_l0 += 0.1
            return gru

        monkeypatch.setattr(rivals, "make_path", wrong)
        rows = serve("layer", self.parts("nn.GRU", "triton"), seconds=0.0).rows()
        assert {row["path"]: row["status"] for row in rows} == {"nn.GRU": "measured", "triton": "failed"}
        assert all(row["gpu_ms"] is None for row in rows if row["path"] == "triton")

    def test_a_path_without_a_graph_keeps_its_other_figures(self, monkeypatch):
        def no_capture(self, work):
            raise RuntimeError("not here")

        monkeypatch.setattr(Cpu, "capture", no_capture)
        monkeypatch.setattr(Gpu, "capture", no_capture)
        rows = serve("layer", self.parts("nn.GRU"), seconds=0.0).rows()
        assert [(row["status"], row["graph_ms"], row["message"]) for row in rows] == [
            ("measured", None, "no graph: RuntimeError: not here")
        ] * 2

    def test_a_rival_that_is_not_there_is_refused(self):
        rows = serve("layer", self.parts("flashrnn"), seconds=0.0).rows()
        assert [(row["status"], row["message"]) for row in rows] == [("refused", "flashrnn is not installed")] * 2

    def test_the_epoch_says_how_it_was_done(self):
        shape = Shape(steps=2, batch=3, hidden=16)
        parts = {path: timing_rows("epoch", path, shape, "fp32", ("epoch",)) for path in ("nn.GRU", "triton")}
        rows = serve("epoch", parts, seconds=0.0, windows=7).rows()
        assert [row["status"] for row in rows] == ["measured", "measured"]
        assert all(row["message"].startswith("7 generated windows on the device") for row in rows)
        assert all(row["gpu_ms"] is None and row["graph_ms"] == 2.0 for row in rows)


def test_rounds_interleave_and_take_turns_in_going_first():
    order = []

    class Counting(Cpu):
        fewest_rounds = 4

        def time_ms(self, figure, work, lead_ms=0.0):
            order.append((figure, work()))
            return 1.0

    contestants = [Contestant(name, {"gpu_ms": lambda name=name: name}) for name in "abc"]
    times = race(Counting(), contestants, seconds=0.0)
    assert {name: len(taken["gpu_ms"]) for name, taken in times.items()} == dict.fromkeys("abc", 4)
    assert [name for _, name in order[-12:]] == list("abcbcacababc")
    assert figures_of({"gpu_ms": [1.0, 2.0, 9.0]}) == {"quartiles": {"gpu_ms": [1.0, 9.0]}, "gpu_ms": 2.0, "rounds": 3}


class TestWhatIsMadeOfTheRows:
    def timing(self, path, **found):
        (row, _) = timing_rows("layer", path, Shape(), "fp32", ("forward", "forward+backward"))
        return row | {"status": "measured", "eager_ms": 1.0, "graph_ms": 1.0} | found

    def test_a_loss_is_listed_with_its_numbers(self, kept):
        kept.add(
            "timings",
            [self.timing("nn.GRU", gpu_ms=0.5), self.timing("triton", gpu_ms=2.0), self.timing("resident", gpu_ms=1.0)],
        )
        (loss,) = kept.losses()
        assert (loss["path"], loss["ratio"]["gpu_ms"]) == ("resident", 0.5)
        assert (loss["ours"]["gpu_ms"], loss["nn_gru"]["gpu_ms"]) == (1.0, 0.5)
        assert "layer forward resident fp32 T=60 B=64 H=128: gpu_ms 1.0000 against 0.5000" in summary(kept)

    def test_a_win_is_not(self, kept):
        kept.add("timings", [self.timing("nn.GRU", gpu_ms=0.96), self.timing("triton", gpu_ms=1.0)])
        assert kept.losses() == []

    def test_proven_is_what_passed_throughout(self, kept):
        for hidden, found in {
            16: ["passed", "passed"],
            32: ["passed", "failed"],
            64: ["refused"],
            96: ["passed", "out of time"],
        }.items():
            kept.add("correctness", [grid_row(hidden) | {"status": status, "message": None} for status in found])
        assert [(entry["kernel"], entry["hidden"], entry["dtype"], entry["capability"]) for entry in kept.proven()] == [
            ("triton", 16, "float32", [9, 0])
        ]
        assert [row["hidden"] for row in kept.failures()] == [32]

    def test_floors_are_of_the_steps_that_follow_one_another(self):
        facts = {"step_floor_us": {"mufu": {"accurate": 0.2, "approximate": 0.1}, "mma": {"fp32": 0.3, "bf16": 0.1}}}
        (forward, both) = timing_rows("layer", "resident", Shape(), "fp32", ("forward", "forward+backward"))
        assert floor_ms(forward, facts, MACHINE) == pytest.approx(60 * 2 * 0.5e-3)
        assert floor_ms(both, facts, MACHINE) == pytest.approx(60 * 2 * 0.8e-3)
        (bf16,) = timing_rows("recurrence", "resident", Shape(layers=1), "bf16", ("backward",))
        assert floor_ms(bf16, facts, MACHINE) == pytest.approx(60 * 0.1e-3)
        # Not measured, another width, or more programs than run at once: no figure.
        (tf32,) = timing_rows("recurrence", "resident", Shape(layers=1), "tf32", ("backward",))
        (wide,) = timing_rows("layer", "resident", Shape(hidden=64), "fp32", ("forward",))
        (many,) = timing_rows("layer", "resident", Shape(batch=1024), "fp32", ("forward",))
        assert [floor_ms(row, facts, MACHINE) for row in (tf32, wide, many)] == [None, None, None]

    def test_facts_go_to_their_places(self, kept):
        for name, status, value in (
            ("copy_gb_s", "measured", 9.0),
            ("step_floor_us/mma/fp32", "measured", 0.5),
            ("launch_us", "failed", None),
        ):
            kept.add("facts", [{"name": name, "value": value, "status": status, "message": "why"}])
        kept.save()
        written = on_disk(kept)
        assert (written["facts"]["copy_gb_s"], written["facts"]["launch_us"]) == (9.0, None)
        assert written["facts"]["step_floor_us"]["mma"] == {"fp32": 0.5}
        assert written["missing_facts"] == {"launch_us": "failed: why"}

    @pytest.mark.parametrize("whole", [FULL, SMOKE], ids=["full", "smoke"])
    def test_no_timing_is_asked_for_twice(self, whole):
        jobs = [*whole.main_workload(), *whole.training(), *whole.slow_rivals()]
        jobs += [*whole.sweeps(whole.sweep_modes), *whole.sweeps(whole.late_sweep_modes)]
        rows = [row for job in jobs for rows in job.parts.values() for row in rows]
        keys = [(*record._case(row), row["path"]) for row in rows]
        assert len(keys) == len(set(keys))


class TestTheCommand:
    @pytest.mark.parametrize(("failing", "code"), [(None, 0), ("correctness", 1), ("planted defect", 1)])
    def test_exit_code(self, failing, code, tmp_path, monkeypatch, capsys):
        def answer(order):
            if order["do"] == "machine":
                return [{"part": "machine", "rows": [{"machine": MACHINE, "versions": {}}]}, {"done": True}]
            lines = list(done(order))
            if order["do"] == failing:
                lines = [
                    line | {"rows": [row | {"status": "failed"} for row in line["rows"]]} if "rows" in line else line
                    for line in lines
                ]
            return lines

        monkeypatch.setattr(gpu, "FULL", SMOKE)
        monkeypatch.setattr(gpu, "Process", lambda environment, cpu: Scripted(answer))
        assert gpu.main(["--out", str(tmp_path)]) == code
        (path,) = tmp_path.iterdir()
        written = json.loads(path.read_text())
        assert path.name == f"Some-GPU-{written['date'][:10]}.json"
        assert (written["schema"], written["kind"], written["complete"]) == (1, "gpu", True)
        assert str(path) in capsys.readouterr().out

    def test_without_a_gpu_it_says_so(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(gpu, "Process", lambda environment, cpu: Scripted(lambda order: [None]))
        assert gpu.main(["--out", str(tmp_path / "new")]) == 2
        assert "SIGKILL" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_jobs_are_plain_data(self):
        for job in (*FULL.correctness(), FULL.facts(), *FULL.main_workload(), *FULL.training()):
            assert isinstance(job, Job)
            assert json.loads(json.dumps(job.parts)) == job.parts
            assert job.do in {**worker.BY_PART, **worker.TOGETHER}
