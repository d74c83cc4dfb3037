"""Several processes train as one: two of them over gloo on this machine, against one, and each other's checkpoints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import h5py
import pytest
import torch
from safetensors.torch import load_file
from training.runs import assert_same, checkpoint_of, rows, timeless

from bigru.config import ConfigError
from bigru.data.synthetic import write_synthetic
from bigru.training.distributed import Team, current_team

# Forks the processes of one run after the other, which saves each of them the imports.
SERVER = """
import json, os, signal, socket, sys, traceback
from bigru.model.metrics import masked_mse
from bigru.train import main
from bigru.training.run import Parts

for line in sys.stdin:
    order, children = json.loads(line), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(order["size"]):
        child = os.fork()
        if child == 0:
            # One that waits for ever fails its test, and not the suite.
            signal.alarm(120)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["size"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.dup2(os.open(f"{order['output']}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(2, 1)
            calls = [0]

            def counted(*arguments):
                calls[0] += 1
                if [rank, calls[0]] == order["at"]:
                    os.kill(os.getpid(), order["signal"])
                return masked_mse(*arguments)

            parts = Parts(loss=counted, write_report=lambda folder: folder.parent / "results_bigru.md")
            try:
                code = main(order["argv"], parts)
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""

pytestmark = [
    pytest.mark.skipif(os.name != "posix" or not torch.distributed.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "clips"
    write_synthetic(root, 24, 1)
    return root


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        yield process


@pytest.fixture
def run(server, tmp_path):
    """Has so many processes run the command; returns their exit codes and what each said."""

    def run(size, *argv, at=None, number=0):
        order = {"size": size, "argv": list(map(str, argv)), "at": at, "signal": number, "output": f"{tmp_path}/said"}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return codes, [(tmp_path / f"said{rank}").read_text() for rank in range(size)]

    return run


@pytest.fixture
def options(clips, tmp_path):
    """A run of 5 steps an epoch, of which no batch is two equal halves."""

    def options(name, epochs=1, dropout=0.0, *more):
        text = "--observed 4 --predicted 4 --hidden-size 4 --stride 10 --batch-size 31 --lr 1e-2 --warmup-epochs 0"
        mine = ["--data-root", clips, "--out", tmp_path / name, "--epochs", epochs, "--dropout", dropout, *more]
        return [*text.split(), "--device", "cpu", *mine]

    return options


def folder_of(tmp_path, name):
    (folder,) = (path.parent for path in (tmp_path / name).glob("*/config.json"))
    return folder


def near(one, other):
    """Whether all weights of two checkpoints are the same to 1e-6 of each tensor's norm."""
    one, other = (checkpoint_of(run)["model"] for run in (one, other))
    return all((one[name] - other[name]).norm() <= 1e-6 * other[name].norm() for name in other)


def same_figures(one, other):
    return all(
        row == pytest.approx(expected, rel=1e-5) for row, expected in zip(timeless(one), timeless(other), strict=True)
    )


@pytest.mark.parametrize("mask", [(), ("--no-mask-missing",)], ids=["masked", "unmasked"])
def test_two_processes_train_as_one(run, options, tmp_path, mask):
    assert run(1, *options("one", 1, 0.0, *mask))[0] == [0]
    codes, (first, second) = run(2, *options("two", 1, 0.0, *mask))
    assert codes == [0, 0], first + second
    one, two = folder_of(tmp_path, "one"), folder_of(tmp_path, "two")
    assert checkpoint_of(two)["optimizer"]["state"][0]["step"] == 5
    assert near(two, one)
    assert same_figures(two, one)
    assert json.loads((two / "summary.json").read_text())["test"] == pytest.approx(
        json.loads((one / "summary.json").read_text())["test"], rel=1e-5
    )
    # One writes and speaks.
    assert second == ""
    assert len(re.findall("^epoch   1/1", first, re.MULTILINE)) == 1
    assert "2 processes" in first
    assert "results_bigru.md" in first


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_a_checkpoint_goes_on_with_other_processes(run, options, tmp_path, before, after):
    dropout = 0.2 if before == after else 0.0
    assert run(before, *options("whole", 2, dropout))[0] == [0] * before
    # In the middle of the second epoch, told to a process that does not write.
    codes, said = run(before, *options("stopped", 2, dropout), at=[before - 1, 8], number=signal.SIGTERM)
    assert codes == [143] * before, said
    assert "SIGTERM: stopped after batch 3 of 5 of epoch 2" in said[0]
    whole, folder = folder_of(tmp_path, "whole"), folder_of(tmp_path, "stopped")
    codes, said = run(after, "--resume", folder)
    assert codes == [0] * after, said
    assert near(folder, whole)
    assert same_figures(folder, whole)
    if before == after:
        # To the bit, each with its own dropout.
        one, other = checkpoint_of(whole)["random_states"]
        assert not torch.equal(one, other)
        assert_same(folder, whole)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_does_not_leave_the_others_waiting(run, options, tmp_path, lost):
    codes, said = run(2, *options("run", 3), at=[lost, 7], number=signal.SIGKILL)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    if lost == 1:
        assert "another process of this run has ended" in said[0]
        assert "go on with: python -m bigru.train --resume" in said[0]
        assert "Traceback" not in said[0]
    else:
        assert said[1] == ""
    # The first epoch is not lost.
    folder = folder_of(tmp_path, "run")
    assert len(rows(folder)) == 1
    codes, said = run(2, "--resume", folder)
    assert codes == [0, 0], said
    assert len(rows(folder)) == 3


def test_an_error_of_all_processes_is_said_once(run, options):
    codes, said = run(2, *options("run"), "--batch-size", 1)
    assert codes == [2, 2]
    assert said == ["".join(said), ""]
    assert "batch_size: expected at least a window for each of 2 processes, got 1" in said[0]
    codes, said = run(2, *options("run"), "--weights", "none.pt")
    assert codes == [2, 2]
    assert said[1] == ""
    assert "none.pt is not a file" in said[0]


def test_a_sweep_goes_on_past_what_the_clips_lack(run, options, clips, tmp_path):
    """Older clips hold neither objects nor surrogate; the other process must not be left waiting for the first."""
    older = tmp_path / "older"
    shutil.copytree(clips, older, ignore=shutil.ignore_patterns("*.cache"))
    for path in older.rglob("*.h5"):
        with h5py.File(path, "a") as file:
            del file["rec_bboxes"], file["surrogate_hands"]
    codes, said = run(2, *options("sweep", 1, 0.0, "--data-root", older, "--sweep", "modalities"))
    assert codes == [2, 2]
    assert "sweep: 3 of 5 runs failed: hands + objects: no window" in said[0]
    assert len([*(tmp_path / "sweep" / "sweep_modalities").glob("*/summary.json")]) == 2


def test_torchrun_starts_it(options, tmp_path):
    """The real thing, as the documentation gives it."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m bigru.train"
    command = [sys.executable, *torchrun.split(), *map(str, options("run"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    folder = folder_of(tmp_path, "run")
    assert len(rows(folder)) == 1
    assert load_file(folder / "weights.safetensors")
    assert (tmp_path / "run" / "results_bigru.md").is_file()
    assert len(re.findall("^epoch   1/1", result.stderr, re.MULTILINE)) == 1


def test_a_team():
    assert current_team() == Team()
    shares = [Team(rank, 3).share(8) for rank in range(3)]
    assert [number for share in shares for number in range(8)[share]] == list(range(8))
    assert {len(range(8)[share]) for share in shares} == {2, 3}
    assert Team(1, 2, 1).device("cpu") == "cpu"


def test_a_team_has_a_gpu_for_each(monkeypatch):
    assert Team(3, 4, 1).device("auto", 2) == Team(3, 4, 1).device("cuda", 2) == "cuda:1"
    assert Team().device("auto", 2) == "auto"
    with pytest.raises(ConfigError, match=r"device: expected a GPU for each process .*, got 2 for 3"):
        Team(2, 3, 2).device("auto", 2)
    # The first, which alone speaks, has one, but the others have none.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"device: expected a GPU for each process .*, got 2 for 3"):
        Team(0, 3, 0).device("auto", 2)
    with pytest.raises(ConfigError, match="device: expected auto, cuda or cpu for 2 processes, which take a GPU each"):
        Team(0, 2, 0).device("cuda:1", 2)
