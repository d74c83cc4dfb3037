"""What ends a run in a process of its own: a terminal that is gone, kills at random moments, Ctrl-C of the command."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training.runs import assert_same, at_step, checkpoint_of, main, make_up, only_run, options, rows

from bigru.data.synthetic import write_synthetic

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]


def test_a_terminal_that_is_gone_does_not_cost_the_epoch(config, tmp_path):
    """SIGHUP comes when every write to the terminal already fails, the progress bar's among them."""
    program = "import sys; from training.test_kills import hang_up; sys.exit(hang_up(*sys.argv[1:]))"
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
    saved = checkpoint_of(only_run(config))["progress"]
    assert (saved["epoch"], saved["step"]) == (1, 3)


def hang_up(root, terminal):
    """Trains on a terminal that is closed in the eighth step."""
    config = make_up(Path(root))
    # Under nohup it is ignored, as a run respects.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def close():
        os.close(int(terminal))
        os.kill(os.getpid(), signal.SIGHUP)

    arguments = [*options(config), "--epochs", "6"]
    return main(arguments, loss=at_step(8, close))


KILLER = """
import io, os, random, signal, sys, time
from pathlib import Path
# Once, and not in every child.
import bigru.training.sweep
from bigru import train
from bigru.report import figures

figures.DPI = 30
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
        assert_same(folder, whole)
        assert len(rows(folder)) == 8
        document = (out / "results_bigru.md").read_text()
        assert len(re.findall(rf"<!-- run {folder.name} -->", document)) == 1
        for link in re.findall(r"\]\(([^)]+\.png)\)", document):
            assert (out / link).read_bytes().startswith(b"\x89PNG")


def test_the_command_from_end_to_end(tmp_path):
    """The real thing, in a process of its own: interrupted, resumed, and documented."""
    root = tmp_path / "clips"
    write_synthetic(root, 60, 1)
    command = [sys.executable, "-m", "bigru.train"]
    text = "--observed 8 --predicted 8 --hidden-size 8 --stride 12 --epochs 100000 --patience 100000"
    arguments = [*text.split(), "--data-root", str(root), "--out", str(tmp_path / "runs")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Where the tests run in the background of a script, SIGINT is ignored, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    try:
        for line in process.stderr:
            if line.startswith("epoch   2/"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "KeyboardInterrupt" not in rest
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"--resume {folder}" in rest
    done = len(rows(folder))
    enough = ["--resume", str(folder), "--epochs", str(done + 2)]
    result = subprocess.run([*command, *enough], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(rows(folder)) in (done + 1, done + 2)
    document = (tmp_path / "runs" / "results_bigru.md").read_text()
    assert "BIGRU" in document
    assert str(tmp_path / "runs" / "results_bigru.md") in result.stderr
