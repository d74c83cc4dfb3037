"""What the commands share: the extra they need, and a terminal that takes any text."""

import io
import os
import subprocess
import sys

import pytest

from bigru.command import COMMANDS, FORECASTER, prepare_console

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
print([run(name, []) for name in COMMANDS])
"""


def test_the_layer_needs_no_extra_and_commands_name_theirs():
    result = subprocess.run([sys.executable, "-c", WITHOUT, *FORECASTER], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # What takes long to import is not needed either: torch alone takes longer.
    assert result.stdout.splitlines() == ["[]", "[2, 2, 2, 2, 2]"]
    assert result.stderr.splitlines() == [
        f"bigru.{name} needs the extra forecaster, pip install 'bigru[forecaster]': no {', '.join(FORECASTER)} here"
        for name in COMMANDS
    ]


def test_the_commands_are_listed():
    result = subprocess.run([sys.executable, "-m", "bigru"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(f"python -m bigru.{name} " in result.stdout for name in COMMANDS)


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
