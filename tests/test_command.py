"""What the commands share: the extra they need, and a terminal that takes any text."""

import io
import os
import subprocess
import sys

import pytest

from bigru import __main__
from bigru.command import COMMANDS, FORECASTER, CommandError, ending, prepare_console, training_line


def python(code, *argv):
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)


WITHOUT = """
import sys
# To Python these are not installed.
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import torch
import bigru
layer = bigru.BiGRU(3, 4)
layer(torch.randn(5, 2, 3), lengths=[5, 3])[0].sum().backward()
print([name for name in ("triton", "onnx", "torch._dynamo", "torch._inductor") if name in sys.modules])
bigru.HandForecaster(hidden_size=4)
from bigru.command import COMMANDS, run
print([run(name, [""]) for name in COMMANDS])
# Nor, from here on, is triton.
sys.modules["triton"] = None
x = torch.randn(2, 2, 3)
print(bigru.BiGRU(3, 4)(x)[0].shape, torch.compile(bigru.BiGRU(3, 4), backend="eager")(x)[0].shape)
print("bigru.kernels.cell" in sys.modules)
try:
    bigru.BiGRU(3, 4, backend="triton")(x)
except RuntimeError as error:
    print(str(error).partition(": ")[2])
"""


@pytest.mark.slow
def test_the_layer_needs_neither_extra_nor_triton_and_commands_name_theirs():
    result = python(WITHOUT, *FORECASTER)
    assert result.returncode == 0, result.stderr
    # What takes long to import is not needed either: torch alone takes longer.
    first, codes, shapes, imported, refusal = result.stdout.splitlines()
    assert (first, codes, imported) == ("[]", "[2, 2, 2, 2, 2, 2]", "False")
    assert shapes == "torch.Size([2, 2, 8]) torch.Size([2, 2, 8])"
    assert refusal.startswith("triton is not installed")
    *told, last = result.stderr.splitlines()
    assert told == [
        f"bigru.{name} needs the extra forecaster (in a clone: pip install '.[forecaster]'): "
        f"no {', '.join(FORECASTER)} here"
        for name in [*COMMANDS][:-1]
    ]
    assert last.startswith("bigru.prove: expected no empty argument")  # which needs none


@pytest.mark.parametrize("name", [*COMMANDS][:-1])
def test_a_module_without_its_extra_says_so(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['h5py'] = None\n")
    found = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", f"bigru.{name}", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": found})
    told = f"bigru.{name} needs the extra forecaster (in a clone: pip install '.[forecaster]'): no h5py here\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", told)


HELP = """
import sys
from bigru.command import COMMANDS, run
for name in COMMANDS:
    try:
        run(name, ["--help"])
    except SystemExit as ending:
        assert ending.code == 0
print("torch" in sys.modules)
"""


def test_no_help_waits_for_torch():
    result = python(HELP)
    assert result.stdout.count("usage: python -m bigru.") == len(COMMANDS), result.stderr
    assert result.stdout.splitlines()[-1] == "False"
    # Nor does it show how an option is typed here.
    assert "None" not in result.stdout
    assert "(default: )" not in result.stdout


@pytest.mark.parametrize(("argv", "code"), [([], 0), (["--help"], 0), (["fly"], 2)])
def test_the_commands_are_listed(monkeypatch, capsys, argv, code):
    monkeypatch.setattr(sys, "argv", ["bigru", *argv])
    assert __main__.main() == code
    listed = capsys.readouterr().out
    assert all(f"python -m bigru.{name} " in listed for name in COMMANDS)


class Left(KeyboardInterrupt):
    signal = 15


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (CommandError("mend it"), 2, "mend it"),
        (OSError(28, "No space left on device", "out"), 2, "[Errno 28] No space left on device: 'out'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Left(), 143, "interrupted"),
    ],
)
def test_every_command_ends_alike(capsys, error, code, told):
    def main(argv):
        raise error

    assert ending("name")(main)([]) == code
    assert capsys.readouterr().err == f"bigru.name: {told}\n"


@pytest.mark.parametrize(("argv", "place"), [(["--data-root", ""], "--data-root"), (["--out="], "--out=")])
def test_an_empty_argument_is_refused(capsys, argv, place):
    assert ending("name")(lambda argv: 0)(argv) == 2
    assert capsys.readouterr().err.endswith(f"got one at {place}\n")


READER = """
import sys
from bigru.command import ending
sys.exit(ending("name")(lambda argv: print("1\\n" * 99999))([]))
"""


@pytest.mark.skipif(os.name != "posix", reason="asks a shell")
def test_a_reader_that_has_had_enough_is_no_error():
    shell = '"$0" -c "$1" | head -1; echo "${PIPESTATUS[0]}"'
    result = subprocess.run(["bash", "-c", shell, sys.executable, READER], capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr) == (["1", "141"], "")


def test_what_goes_on_is_printed_as_the_readers_shell_takes_it(monkeypatch):
    assert training_line("--resume", "a b") == "python -m bigru.train --resume 'a b'"
    monkeypatch.setenv("BIGRU_TRAIN", "python -m nox -s train --")
    assert training_line("--resume", "a b") == "python -m nox -s train -- --resume 'a b'"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\xfc \xe4"), ("utf-8", "ü \\xe4".encode())])
def test_any_text_can_be_printed(monkeypatch, encoding, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    prepare_console()
    print("ü", os.fsdecode(b"\xe4"), end="", flush=True)
    assert written.getvalue() == shown


CLOSED = """
import os, sys
from bigru.command import prepare_console
prepare_console()
print("lost", file=sys.stderr)
# Nothing else gets the number of stderr, and what libraries write there.
assert os.open(os.devnull, os.O_RDONLY) > 2
from tqdm import tqdm
for _ in tqdm(range(3)):
    pass
print("done")
"""


@pytest.mark.skipif(os.name != "posix", reason="asks a shell")
def test_a_closed_stderr_ends_nothing():
    result = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" 2>&-', sys.executable, CLOSED], stdout=subprocess.PIPE, text=True
    )
    assert (result.returncode, result.stdout) == (0, "done\n")
