"""Each example runs, and what it prints is what it promises."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_replace_gru(capsys):
    assert load("replace_gru").main(20) < 3
    out = capsys.readouterr().out
    assert "replaced: gru; now BiGRU(" in out
    assert "and back: GRU(" in out


def test_varlen(capsys):
    load("varlen").main()
    assert "each sequence alone give the same" in capsys.readouterr().out


def test_onnx_export(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    load("onnx_export").main(str(tmp_path / "gru.onnx"))
    *_, last = capsys.readouterr().out.split()
    assert float(last) < 1e-5


def test_realtime(tmp_path, capsys):
    latencies = load("realtime").main(["--save", str(tmp_path / "live.gif"), "--frames", "62"])
    assert len(latencies) == 3
    assert (tmp_path / "live.gif").read_bytes().startswith(b"GIF")
    assert "3 forecasts on one thread: median" in capsys.readouterr().out
