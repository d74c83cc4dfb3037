"""What ends a run before its time, and that nothing is lost: signals, kills, disks, other runs, broken numbers."""

import errno
import fcntl
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.runs import (
    at_step,
    change,
    dataset,
    main,
    make_up,
    only_run,
    options,
    resume,
    rows,
    same_weights,
    timeless,
    train,
)

from bigru.config import ConfigError
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import load_dataset
from bigru.model.metrics import masked_mse
from bigru.training import run_dir
from bigru.training.signals import Interrupted, StopRequest, on_signals
from bigru.training.trainer import DivergedError, Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


@pytest.fixture(autouse=True)
def heeded_hang_up():
    """Heeds SIGHUP in these tests, in processes that they start too: under nohup it is ignored, as a run respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def config(tmp_path):
    return make_up(tmp_path)


def send(*numbers):
    """Returns what sends this process these signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.fixture(autouse=True)
def signals():
    """As in a terminal: where the tests run in the background of a script, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "stop", "epoch", "batch"),
    [
        (signal.SIGINT, 130, 8, 1, 3),
        (signal.SIGTERM, 143, 10, 1, 5),
        (signal.SIGHUP, 129, 1, 0, 1),
        (signal.SIGUSR1, 138, 30, 5, 5),
    ],
    ids=["mid-epoch", "last batch", "first batch", "very last batch"],
)
def test_a_signal_ends_the_run_after_its_step(config, capsys, number, code, stop, epoch, batch):
    # Dropout is on, so that the random state counts too.
    whole = train(change(config, "optim", epochs=6))
    capsys.readouterr()
    arguments = [*options(config), "--epochs", "6", "--lr", "1e-2", "--warmup-epochs", "2"]
    assert main(arguments, loss=at_step(stop, send(number))) == code
    folder = only_run(config, whole)
    error = capsys.readouterr().err
    assert f"{number.name}: stopped after batch {batch} of 5 of epoch {epoch + 1}" in error
    assert f"go on with: python -m bigru.train --resume {folder}\n" in error
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]
    assert (saved["epoch"], saved["step"]) == (epoch, batch)
    assert len(rows(folder)) == epoch
    assert not (folder / "summary.json").exists()
    torch.rand(17)
    assert main(["--resume", str(folder)]) == 0
    assert f"going on after batch {batch} of epoch {epoch + 1}" in capsys.readouterr().err
    assert timeless(folder) == timeless(whole)
    assert same_weights(folder, whole)
    assert rows(folder)[epoch]["train_s"] > 0
    # Whoever called may be interrupted as before.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_two_epochs(config):
    class Signalled(Trainer):
        def validate(self):
            if self.progress.epoch == 0:
                send(signal.SIGTERM)()
            return super().validate()

    whole = train(config)
    with pytest.raises(Interrupted) as stop:
        train(config, trainer=Signalled)
    assert stop.value.signal == signal.SIGTERM
    folder = only_run(config, whole)
    assert len(rows(folder)) == 1
    assert timeless(resume(folder)) == timeless(whole)


def test_a_signal_where_nothing_has_to_be_finished(config, capsys):
    def signalled(*_):
        send(signal.SIGTERM)()

    assert main(options(config), load=signalled) == 143
    assert main(options(config), write_report=signalled) == 143
    assert f"--resume {only_run(config)}" in capsys.readouterr().err


def test_a_second_signal_does_not_wait(config):
    with pytest.raises(Interrupted):
        train(config, loss=at_step(8, send(signal.SIGINT, signal.SIGINT)))
    # The last whole checkpoint is that of epoch 1.
    assert torch.load(only_run(config) / "checkpoint.pt", weights_only=True)["progress"]["step"] == 0


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_cost_the_epoch(config, tmp_path):
    """SIGHUP comes when every write to the terminal already fails, the progress bar's among them."""
    program = "import sys; from training.test_stops import hang_up; sys.exit(hang_up(*sys.argv[1:]))"
    terminal, own_end = pty.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), str(terminal)],
        stdin=own_end,
        stdout=own_end,
        stderr=own_end,
        pass_fds=[terminal],
        env=environment,
    )
    os.close(own_end)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    saved = torch.load(only_run(config) / "checkpoint.pt", weights_only=True)["progress"]
    assert (saved["epoch"], saved["step"]) == (1, 3)


def hang_up(root, terminal):
    """Trains on a terminal that is closed in the eighth step."""
    config = make_up(Path(root))

    def close():
        os.close(int(terminal))
        send(signal.SIGHUP)()

    arguments = [*options(config), "--epochs", "6"]
    return main(arguments, loss=at_step(8, close))


def test_an_ignored_signal_stays_ignored_and_threads_need_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals(StopRequest().receive):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    errors = []

    def elsewhere():
        try:
            with on_signals(StopRequest().receive):
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not errors


KILLER = """
import io, os, random, signal, sys, time
from pathlib import Path
# Once, and not in every child.
import bigru.training.sweep
from bigru import train

root, out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
OPTIONS = ["--data-root", str(root), "--observed", "4", "--predicted", "4", "--hidden-size", "4", "--stride", "20",
           "--batch-size", "32", "--epochs", "8", "--lr", "1e-2", "--warmup-epochs", "2", "--device", "cpu"]


def start(arguments, last=0, name=""):
    # Kills itself as it empties or renames a file of that name for the so many'th time, if that is given.
    child = os.fork()
    if child == 0:
        calls = [0]

        def count(file):
            calls[0] += name in str(file)
            if calls[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

        def emptied(file, mode="r", *arguments, **options):
            opened = open(file, mode, *arguments, **options)
            if "w" in mode:
                count(file)
            return opened

        renamed = os.replace
        os.replace = lambda old, new: (count(new), renamed(old, new))
        io.open = emptied
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(train.main(arguments))
    return child


def run(arguments):
    assert os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1]) == 0, arguments


begun = time.perf_counter()
run([*OPTIONS, "--out", str(out / "whole")])
whole_s = time.perf_counter() - begun
moments, kills, number = random.Random(seed), 0, 0
while kills < 20:
    number += 1
    folder = out / f"killed{number}"
    while True:
        # Only a run that has written its settings is one.
        runs = [path for path in folder.glob("2*") if (path / "config.json").is_file()]
        arguments = ["--resume", str(runs[0])] if runs else [*OPTIONS, "--out", str(folder)]
        # Half of them anywhere, half of them in the middle of a file.
        in_file = moments.random() < 0.5
        name, most = moments.choice([("checkpoint.pt", 5), ("", 25)])
        last = moments.randint(1, most)
        child = start(arguments, last, name) if kills < 20 and in_file else start(arguments)
        if kills < 20 and not in_file:
            time.sleep(moments.uniform(0, whole_s))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        kills += 1
print(number, kills)
"""


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments(tmp_path):
    write_synthetic(tmp_path / "clips", 24, 1)
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path / "clips"), str(tmp_path), "7"],
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    number, kills = result.stdout.split()
    assert kills == "20"
    (whole,) = (path.parent for path in (tmp_path / "whole").glob("*/summary.json"))
    for index in range(1, int(number) + 1):
        out = tmp_path / f"killed{index}"
        (folder,) = (path.parent for path in out.glob("*/summary.json"))
        assert timeless(folder) == timeless(whole)
        assert len(rows(folder)) == 8
        assert same_weights(folder, whole)
        document = (out / "results_bigru.md").read_text()
        assert len(re.findall(rf"<!-- run {folder.name} -->", document)) == 1
        for link in re.findall(r"\]\(([^)]+\.png)\)", document):
            assert (out / link).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors", "metrics.jsonl", "train.log", "samples.npz"])
def test_a_full_disk(config, monkeypatch, capsys, name):
    """The disk is full from epoch 3 on, as the file of that name is written."""
    whole = train(config)
    real_open, full = open, [False]

    class Full:
        """A file that takes nothing more."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            if full[0]:
                self.file.write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content)

    def opened(file, *arguments, **options):
        result = real_open(file, *arguments, **options)
        return Full(result) if str(file).startswith(str(config.run.out)) and name in str(file) else result

    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)
    loss = at_step(11 if name != "samples.npz" else 30, lambda: full.__setitem__(0, True))
    capsys.readouterr()
    assert main([*options(config), "--epochs", "6", "--lr", "1e-2", "--warmup-epochs", "2"], loss=loss) == 2
    folder = only_run(config, whole)
    error = capsys.readouterr().err
    assert f"go on with: python -m bigru.train --resume {folder}\n" in error
    assert re.search(rf"bigru\.train: \[Errno 28\] No space left on device: '{folder / name}'", error)
    assert "Traceback" not in error
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["epoch"]
    assert kept == {"checkpoint.pt": 2, "samples.npz": 6}.get(name, 3)
    assert not list(folder.glob(".*.partial"))
    full[0] = False
    assert timeless(resume(folder)) == timeless(whole)
    assert same_weights(folder, whole)


def test_a_folder_that_cannot_be_written(config, monkeypatch, capsys, tmp_path):
    # Root may write anywhere: the system's answer is put in its mouth.
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert main(options(config), load=None) == 2
    assert f"out: expected a folder that can be written, got {tmp_path}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*options(config), "--out", str(tmp_path / "file")], load=None) == 2
    assert f"out: expected a folder that can be written, got {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.fixture
def stopped(config, capsys):
    """The folder of a run that was interrupted in its first epoch."""
    assert main(options(config), loss=at_step(3, send(signal.SIGINT))) == 130
    capsys.readouterr()
    return only_run(config)


def test_a_run_in_a_folder_that_became_read_only(stopped, monkeypatch, capsys):
    real = Path.open

    def read_only(self, mode="r", *arguments, **others):
        if mode[0] in "wa":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, *arguments, **others)

    before = {file: file.read_bytes() for file in stopped.iterdir()}
    monkeypatch.setattr(Path, "open", read_only)
    assert main(["--resume", str(stopped)]) == 2
    assert f"Read-only file system: '{stopped / 'run.lock'}'" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in stopped.iterdir()} == before


def test_a_folder_in_use_by_another_run(stopped, capsys):
    before = {file: file.read_bytes() for file in stopped.iterdir()}
    # A lock of another open file keeps this process out as another process would.
    with (stopped / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--resume", str(stopped)]) == 2
    assert f"{stopped} is in use by another run, process {os.getpid()};" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in stopped.iterdir()} == before
    assert main(["--resume", str(stopped)]) == 0


def test_a_running_run_holds_its_folder(config):
    refused = []

    def try_to_resume():
        with pytest.raises(ConfigError, match="in use by another run"):
            resume(only_run(config))
        refused.append(True)

    train(config, loss=at_step(3, try_to_resume))
    assert refused


def test_a_file_system_without_locks(config, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_dir.fcntl, "flock", none)
    assert main(options(config)) == 0
    assert "cannot be locked here" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("stop", [False, True], ids=["", "interrupted"])
def test_the_batch_of_a_loss_that_is_no_number_is_kept(config, capsys, value, stop):
    seen = []

    def diverging(prediction, target, *others):
        seen.append(target)
        if len(seen) == 7 and stop:
            send(signal.SIGINT)()
        return masked_mse(prediction, target, *others) * (value if len(seen) == 7 else 1)

    assert main([*options(config), "--epochs", "6"], loss=diverging) == 1
    folder = only_run(config)
    assert len(rows(folder)) == 1
    message = capsys.readouterr().err
    assert f"bigru.train: epoch 2, batch 2 of 5: the loss is {value}; " in message
    assert f"the batch is in {folder / 'diverged.npz'}" in message
    assert f"the best weights so far, of epoch 1, are in {folder / 'weights.safetensors'}" in message
    with np.load(folder / "diverged.npz", allow_pickle=False) as stored:
        batch = dict(stored)
    np.testing.assert_array_equal(batch["target"], seen[6])
    again = dataset().train.batch(torch.from_numpy(batch["window"]))
    np.testing.assert_array_equal(batch["x"], again.x)
    np.testing.assert_array_equal(batch["present"], again.present)
    assert batch["stem"].tolist() == [f"clip-{number // 3}" for number in batch["window"]]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "weights.safetensors").values())
    # What a signal leaves is no checkpoint of broken weights.
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def with_infinite_gradients(*steps):
    """Returns a trainer whose gradients overflow in these steps, counted from 1; in all of them without any."""

    class Overflowing(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.calls = 0
            for parameter in self.model.parameters():
                parameter.register_hook(lambda grad: grad + math.inf if self.calls in steps or not steps else grad)

        def learn(self, indices):
            self.calls += 1
            super().learn(indices)

    return Overflowing


def test_a_gradient_that_is_no_number_names_its_own_batch(config):
    with pytest.raises(DivergedError, match=r"epoch 1, batch 2 of 5: the gradient's norm is inf.*no good weights yet"):
        train(config, trainer=with_infinite_gradients(2))


def test_fp16_gradients_that_are_never_numbers_stop_the_run(config):
    config = change(change(config, "run", amp="fp16"), "optim", epochs=20, patience=20)
    with pytest.raises(DivergedError, match="the gradient's norm is"):
        train(config, trainer=with_infinite_gradients())


def test_a_run_stopped_in_an_epoch_of_other_batches(stopped, capsys):
    settings = json.loads((stopped / "config.json").read_text())
    settings["optim"]["batch_size"] = 5
    (stopped / "config.json").write_text(json.dumps(settings))
    assert main(["--resume", str(stopped)]) == 2
    assert (
        "stands in the middle of an epoch of 5 batches of 4; by its settings it has 4 of 5" in capsys.readouterr().err
    )
    settings["optim"]["batch_size"] = 4
    (stopped / "config.json").write_text(json.dumps(settings))
    assert main(["--resume", str(stopped)]) == 0


def test_clips_that_vanish_while_training(config, tmp_path):
    root = tmp_path / "clips"
    write_synthetic(root, 24, 1)
    config = change(change(config, "data", data_root=root, stride=20), "optim", epochs=2, batch_size=32)
    whole = train(config, load=load_dataset)
    folder = train(config, load=load_dataset, loss=at_step(2, lambda: shutil.rmtree(root)))
    assert not root.exists()
    assert timeless(folder) == timeless(whole)
    test, other = (json.loads((run / "summary.json").read_text())["test"] for run in (folder, whole))
    assert test == other
