"""What ends a run before its time, and that nothing is lost: signals, kills, disks, other runs, broken numbers."""

import errno
import fcntl
import math
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import runs

from bigru.config import ConfigError
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import load_dataset
from bigru.model.metrics import masked_mse
from bigru.training.signals import Interrupted, StopRequest, on_signals
from bigru.training.trainer import DivergedError, Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


def send(*numbers):
    """Returns what sends this process these signals."""
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.fixture(autouse=True)
def signals():
    """As in a terminal, in processes too: in the background of a script SIGINT is ignored, and SIGHUP under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
def test_a_signal_ends_the_run_after_its_step(config, whole, capsys, number, code, stop, epoch, batch):
    arguments = [*runs.options(config), "--epochs", "6", "--lr", "1e-2", "--warmup-epochs", "2"]
    assert runs.main(arguments, loss=runs.at_step(stop, send(number))) == code
    folder = runs.only_run(config)
    error = capsys.readouterr().err
    assert f"{number.name}: stopped after batch {batch} of 5 of epoch {epoch + 1}" in error
    assert f"go on with: python -m bigru.train --resume {folder}\n" in error
    saved = runs.checkpoint_of(folder)["progress"]
    assert (saved["epoch"], saved["step"]) == (epoch, batch)
    assert len(runs.rows(folder)) == epoch
    assert not (folder / "summary.json").exists()
    torch.rand(17)
    assert runs.main(["--resume", str(folder)]) == 0
    assert f"going on after batch {batch} of epoch {epoch + 1}" in capsys.readouterr().err
    # Dropout is on, so that the random state counts too.
    runs.assert_same(folder, whole)
    assert runs.rows(folder)[epoch]["train_s"] > 0
    # Whoever called may be interrupted as before.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_between_two_epochs(config, whole):
    class Signalled(Trainer):
        def validate(self):
            if self.progress.epoch == 0:
                send(signal.SIGTERM)()
            return super().validate()

    with pytest.raises(Interrupted) as stop:
        runs.train(config, trainer=Signalled)
    assert stop.value.signal == signal.SIGTERM
    folder = runs.only_run(config)
    assert len(runs.rows(folder)) == 1
    assert runs.timeless(runs.resume(folder)) == runs.timeless(whole)


def test_a_signal_where_nothing_has_to_be_finished(config, capsys):
    def signalled(*_):
        send(signal.SIGTERM)()

    assert runs.main(runs.options(config), load=signalled) == 143
    assert runs.main(runs.options(config), write_report=signalled) == 143
    assert f"--resume {runs.only_run(config)}" in capsys.readouterr().err


def test_a_second_signal_does_not_wait(config):
    with pytest.raises(Interrupted):
        runs.train(config, loss=runs.at_step(8, send(signal.SIGINT, signal.SIGINT)))
    # The last whole checkpoint is that of epoch 1.
    assert runs.checkpoint_of(runs.only_run(config))["progress"]["step"] == 0


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


@pytest.mark.parametrize("name", ["checkpoint.pt", "weights.safetensors", "metrics.jsonl", "train.log", "samples.npz"])
def test_a_full_disk(config, whole, monkeypatch, capsys, name):
    """The disk is full from epoch 3 on, as the file of that name is written."""
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

    def opened(file, *arguments, **others):
        result = real_open(file, *arguments, **others)
        return Full(result) if str(file).startswith(str(config.run.out)) and name in str(file) else result

    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)
    loss = runs.at_step(11 if name != "samples.npz" else 30, lambda: full.__setitem__(0, True))
    assert runs.main([*runs.options(config), "--epochs", "6", "--lr", "1e-2", "--warmup-epochs", "2"], loss=loss) == 2
    folder = runs.only_run(config)
    error = capsys.readouterr().err
    assert f"go on with: python -m bigru.train --resume {folder}\n" in error
    assert re.search(rf"bigru\.train: \[Errno 28\] No space left on device: '{folder / name}'", error)
    assert "Traceback" not in error
    kept = runs.checkpoint_of(folder)["progress"]["epoch"]
    assert kept == {"checkpoint.pt": 2, "samples.npz": 6}.get(name, 3)
    assert not list(folder.glob(".*.partial"))
    full[0] = False
    runs.assert_same(runs.resume(folder), whole)


def test_a_folder_that_cannot_be_written(config, monkeypatch, refused, tmp_path):
    words, file = "out: expected a folder that can be written, got", tmp_path / "file"
    # Root may write anywhere: the system's answer is put in its mouth.
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        refused(f"{words} {tmp_path}", *runs.options(config), load=None)
    file.write_text("")
    refused(f"{words} {file}", *runs.options(config), "--out", str(file), load=None)


@pytest.fixture
def interrupted(config, capsys):
    """The folder of a run that was interrupted in its first epoch."""
    assert runs.main(runs.options(config), loss=runs.at_step(3, send(signal.SIGINT))) == 130
    capsys.readouterr()
    return runs.only_run(config)


def test_a_run_in_a_folder_that_became_read_only(interrupted, monkeypatch, refused):
    real = Path.open

    def read_only(self, mode="r", *arguments, **others):
        if mode[0] in "wa":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, *arguments, **others)

    before = runs.contents(interrupted)
    monkeypatch.setattr(Path, "open", read_only)
    refused(f"Read-only file system: '{interrupted / 'run.lock'}'", "--resume", str(interrupted))
    assert runs.contents(interrupted) == before


def test_a_folder_in_use_by_another_run(interrupted, refused):
    before = runs.contents(interrupted)
    # A lock of another open file keeps this process out as another process would.
    with (interrupted / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(f"{interrupted} is in use by another run, process {os.getpid()};", "--resume", str(interrupted))
    assert runs.contents(interrupted) == before
    assert runs.main(["--resume", str(interrupted)]) == 0


def test_a_running_run_holds_its_folder(config):
    refused = []

    def try_to_resume():
        with pytest.raises(ConfigError, match="in use by another run"):
            runs.resume(runs.only_run(config))
        refused.append(True)

    runs.train(config, loss=runs.at_step(3, try_to_resume))
    assert refused


def test_a_file_system_without_locks(config, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    assert runs.main(runs.options(config)) == 0
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

    assert runs.main([*runs.options(config), "--epochs", "6"], loss=diverging) == 1
    folder = runs.only_run(config)
    assert len(runs.rows(folder)) == 1
    message = capsys.readouterr().err
    assert f"bigru.train: epoch 2, batch 2 of 5: the loss is {value}; " in message
    assert f"the batch is in {folder / 'diverged.npz'}" in message
    assert f"the best weights so far, of epoch 1, are in {folder / 'weights.safetensors'}" in message
    with np.load(folder / "diverged.npz", allow_pickle=False) as stored:
        batch = dict(stored)
    np.testing.assert_array_equal(batch["target"], seen[6])
    again = runs.dataset().train.batch(torch.from_numpy(batch["window"]))
    np.testing.assert_array_equal(batch["x"], again.x)
    np.testing.assert_array_equal(batch["present"], again.present)
    assert batch["stem"].tolist() == [f"clip-{number // 3}" for number in batch["window"]]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "weights.safetensors").values())
    # What a signal leaves is no checkpoint of broken weights.
    saved = runs.checkpoint_of(folder)
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
        runs.train(config, trainer=with_infinite_gradients(2))


def test_fp16_gradients_that_are_never_numbers_stop_the_run(config):
    config = runs.change(runs.change(config, "run", amp="fp16"), "optim", epochs=20, patience=20)
    with pytest.raises(DivergedError, match="the gradient's norm is"):
        runs.train(config, trainer=with_infinite_gradients())


def test_a_run_stopped_in_an_epoch_of_other_batches(interrupted, refused):
    settings = interrupted / "config.json"
    before = settings.read_text()
    settings.write_text(before.replace('"batch_size": 4', '"batch_size": 5'))
    words = "stands in the middle of an epoch of 5 batches of 4; by its settings it has 4 of 5"
    refused(words, "--resume", str(interrupted))
    settings.write_text(before)
    assert runs.main(["--resume", str(interrupted)]) == 0


def test_clips_that_vanish_while_training(config, tmp_path):
    root = tmp_path / "clips"
    write_synthetic(root, 24, 1)
    config = runs.change(runs.change(config, "data", data_root=root, stride=20), "optim", epochs=2, batch_size=32)
    whole = runs.train(config, load=load_dataset)
    folder = runs.train(config, load=load_dataset, loss=runs.at_step(2, lambda: shutil.rmtree(root)))
    assert not root.exists()
    assert runs.timeless(folder) == runs.timeless(whole)
    assert runs.summary_of(folder)["test"] == runs.summary_of(whole)["test"]
