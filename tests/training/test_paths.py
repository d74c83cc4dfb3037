"""Paths of any bytes: nothing that was trained is lost to a name that is not UTF-8 or that Markdown reads as markup."""

import os
import sys
from pathlib import Path

import pytest
from training.runs import at_step, killed, options

from bigru import predict
from bigru.command import prepare_console
from bigru.config import DataConfig, RunConfig, TrainConfig
from bigru.data.synthetic import write_synthetic
from bigru.data.windows import load_dataset
from bigru.report import __main__ as report
from bigru.report import compare
from bigru.report.document import write_report
from bigru.train import main
from bigru.training.run import Parts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes")


@pytest.mark.slow
def test_every_command_takes_a_path_that_is_not_utf8(tmp_path, capsys):
    prepare_console()
    root, out = (tmp_path / os.fsdecode(name) for name in (b"d\xe4ta|1", b"r\xfcns\n*"))
    write_synthetic(root, 24, 1)
    first, *_, clip = sorted(root.rglob("*.h5"))
    # One that is skipped, and so named in skipped.tsv and in the log.
    first.unlink()
    config = TrainConfig(DataConfig(data_root=root), run=RunConfig(out=out))
    arguments = [*options(config), "--stride", "20", "--batch-size", "32"]
    assert main(arguments) == 0
    assert main([*arguments, "--epochs", "2"], Parts(loss=at_step(4, killed))) == 130
    finished, stopped = sorted(path.parent for path in out.glob("*/config.json"))
    assert f"--resume $'{tmp_path}/r\\xfcns\\n*/{stopped.name}'" in capsys.readouterr().err
    assert main(["--resume", str(stopped)]) == 0
    assert report.main([str(finished)]) == 0
    assert compare.main([str(finished), str(stopped), "--out", str(out / "compared")]) == 0
    weights = finished / "weights.safetensors"
    assert predict.main(["--weights", str(weights), "--out", str(out), "--device", "cpu", str(clip)]) == 0
    assert str(tmp_path) + "/d\\xe4ta|1" in (finished / "train.log").read_text()
    assert "d\\xe4ta|1" in (finished / "skipped.tsv").read_text()
    document = (out / "results_bigru.md").read_text()
    assert document.count("d\\\\xe4ta\\|1, split by participant") == 2
    assert document.count(f"--data-root $'{tmp_path}/d\\xe4ta|1'") == 2


def test_tensorboard_says_beforehand_that_it_takes_utf8_only(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    config = TrainConfig(DataConfig(data_root=tmp_path), run=RunConfig(out=Path(os.fsdecode(b"r\xfcns"))))
    assert main([*options(config), "--tensorboard"], Parts(load=load_dataset, write_report=write_report)) == 2
    assert r"tensorboard: expected a path in UTF-8, as it writes to no other, got r\xfcns" in capsys.readouterr().err
