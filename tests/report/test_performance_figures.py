"""The plots of the performance document: what is drawn is what the record says, with units and where it comes from."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import performance_figures as plots
from benchmarks.measured import GpuRecord, read_results
from benchmarks.performance import write_performance
from bigru.report import figures

FOOT = ("Test Card, 2026-12-01;", "bigru 0.1.0", "triton 8.8.8", "python -m benchmarks.gpu --out DIR")


@pytest.fixture
def record(results: Path, fake: SimpleNamespace) -> Any:
    """Reads a record with these timings back."""

    def make(rows: list[dict[str, Any]], date: str = "2026-12-01T10:20:30+00:00") -> GpuRecord:
        (results / "test-card.json").write_text(json.dumps(fake.gpu_record(rows, date=date)))
        (read,) = read_results(results).gpu
        return read

    return make


def texts(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def cells(figure: Figure) -> dict[tuple[str, str], str]:
    """What a heat map says, by shape and the name of its column."""
    axes = figure.axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    drawn = [text for text in axes.texts if text.get_text() not in ("fp32", "tf32", "bf16", "fp16")]
    return {
        (
            rows[round(t.get_position()[1])],
            f"{round(t.get_position()[0])} {columns[round(t.get_position()[0])]}",
        ): t.get_text()
        for t in drawn
    }


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}


def test_heat_map_shows_ratios_and_reasons(record: Any, fake: SimpleNamespace) -> None:
    made = record(
        [
            fake.timing("nn.GRU", 3.0),
            fake.timing("triton", 2.0),
            fake.timing("resident", 1.0),
            fake.timing("nn.GRU", 1.0, precision="tf32"),
            fake.timing("triton", 2.0, precision="tf32"),
            fake.timing("nn.GRU", 50.0, hidden=256),
            fake.timing("triton", 2.0, hidden=256),
            fake.without_figures("refused", "H", path="resident", hidden=256),
            fake.without_figures("out of time", None, path="triton", precision="tf32", hidden=256),
            fake.timing("triton", 2.0, batch=1),
            fake.timing("torch.compile", 9.0),
            fake.timing("nn.GRU", 9.0, work="forward+backward"),
        ]
    )
    figure = plots.speed(made, "forward")
    assert figure is not None
    assert cells(figure) == {
        ("T=60 B=1 H=128", "0 portable"): "no peer",
        ("T=60 B=64 H=128", "0 portable"): "1.50",
        ("T=60 B=64 H=128", "1 resident"): "3.00",
        ("T=60 B=64 H=128", "2 portable"): "0.50",
        ("T=60 B=64 H=256", "0 portable"): "25.0",
        ("T=60 B=64 H=256", "1 resident"): "refused",
        ("T=60 B=64 H=256", "2 portable"): "out of\ntime",
    }
    heads = {text.get_text(): text.xy[0] for text in figure.axes[0].texts if text.get_text() in ("fp32", "tf32")}
    assert heads == {"fp32": 0.5, "tf32": 2.0}
    assert "forward: nn.GRU's GPU time over BiGRU's, same precision" in texts(figure)
    assert figure.axes[1].get_ylabel() == "times as fast"
    assert all(part in texts(figure) for part in FOOT)


def test_heat_map_is_blue_where_we_are_faster(record: Any, fake: SimpleNamespace) -> None:
    made = record([fake.timing("nn.GRU", 2.0), fake.timing("triton", 1.0), fake.timing("resident", 4.0)])
    faster, slower = (patch.get_facecolor()[0] for patch in plots.speed(made, "forward").axes[0].collections)
    assert faster[2] > faster[0] + 0.2
    assert slower[0] > slower[2] + 0.2


def test_heat_map_without_a_ratio_is_not_drawn(record: Any, fake: SimpleNamespace) -> None:
    made = record([fake.timing("triton", 1.0), fake.timing("nn.GRU", 1.0, precision="tf32")])
    assert plots.speed(made, "forward") is None
    assert plots.speed(made, "forward+backward") is None


def test_time_per_step_is_that_of_one_layer(record: Any, fake: SimpleNamespace) -> None:
    rows = [
        fake.timing("triton", 0.12 * steps / 60, steps=steps, floor_ms=0.06 * steps / 60) for steps in (240, 30, 60)
    ]
    rows += [fake.timing("nn.GRU", 0.24), fake.timing("triton", 0.36, batch=8), fake.timing("triton", 0.9, hidden=16)]
    # Two sizes vary at once, another input, another precision, another work: none of these panels'.
    rows += [
        fake.timing("triton", 9.0, steps=30, batch=8),
        fake.timing("triton", 9.0, steps=120, input=5),
        fake.timing("triton", 9.0, steps=120, precision="tf32"),
        fake.timing("triton", 9.0, steps=120, work="backward"),
        fake.without_figures("failed", "no", path="triton", steps=120),
    ]
    figure = plots.steps(record(rows), "layer", "forward")
    assert figure is not None
    over_time, over_batch, over_hidden = map(lines, figure.axes)
    # 0.12 ms over 60 steps and 2 layers.
    assert [size for size, _ in over_time["triton"]] == [30, 60, 240]
    np.testing.assert_allclose([value for _, value in over_time["triton"]], 1.0)
    np.testing.assert_allclose([value for _, value in over_time["floor"]], 0.5)
    np.testing.assert_allclose(over_time["nn.GRU"], [(60, 2.0)])
    np.testing.assert_allclose(over_batch["triton"], [(8, 3.0), (64, 1.0)])
    np.testing.assert_allclose(over_hidden["triton"], [(16, 7.5), (128, 1.0)])
    assert [axes.get_xlabel() for axes in figure.axes] == ["time steps T", "batch B", "hidden size H"]
    assert figure.axes[0].get_ylabel() == "µs per step"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["fp32"] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nn.GRU", "triton", "floor"]
    assert all(part in texts(figure) for part in FOOT)


def test_floor_of_a_single_size_shows(record: Any, fake: SimpleNamespace) -> None:
    rows = [fake.timing("triton", 0.24, hidden=64), fake.timing("triton", 0.24, floor_ms=0.12)]
    (floor,) = (
        line for line in plots.steps(record(rows), "layer", "forward").axes[2].lines if line.get_label() == "floor"
    )
    np.testing.assert_allclose(floor.get_xydata(), [(128, 1.0)])
    # A line of one point is nothing without a marker.
    assert floor.get_marker() == "_"


def test_recurrence_counts_its_one_layer(record: Any, fake: SimpleNamespace) -> None:
    same: dict[str, Any] = {"group": "recurrence", "layers": 1, "input": None}
    figure = plots.steps(
        record([fake.timing("triton", 0.06 * n, steps=60 * n, **same) for n in (1, 2)]), "recurrence", "forward"
    )
    np.testing.assert_allclose(lines(figure.axes[0])["triton"], [(60, 1.0), (120, 1.0)])
    assert "floor" not in lines(figure.axes[0])


def test_a_precision_has_its_own_row_of_panels(record: Any, fake: SimpleNamespace) -> None:
    rows = [
        fake.timing("triton", time, batch=batch, **mode)
        for mode, time in (({"precision": "tf32"}, 0.12), ({"dtype": "bf16", "precision": "-"}, 0.24))
        for batch in (1, 64)
    ]
    figure = plots.steps(record(rows), "layer", "forward")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["tf32"] * 3 + ["bf16"] * 3
    for axes, value in ((figure.axes[1], 1.0), (figure.axes[4], 2.0)):
        np.testing.assert_allclose(lines(axes)["triton"], [(1, value), (64, value)])


def test_memory_is_drawn_in_mib(record: Any, fake: SimpleNamespace) -> None:
    rows = [
        fake.timing(path, 1.0, batch=batch, peak_mib=mib, work="forward+backward")
        for path, batch, mib in (("nn.GRU", 1, 10.0), ("nn.GRU", 64, 500.0), ("resident", 64, 700.0))
    ]
    rows.append(fake.timing("resident", 1.0, batch=1, peak_mib=None, work="forward+backward"))
    figure = plots.memory(record(rows))
    assert lines(figure.axes[1]) == {"nn.GRU": [(1, 10.0), (64, 500.0)], "resident": [(64, 700.0)]}
    assert (figure.axes[0].get_ylabel(), figure.axes[1].get_yscale()) == ("MiB", "log")


def test_nothing_swept_is_not_drawn(record: Any, fake: SimpleNamespace) -> None:
    made = record([fake.timing(), fake.timing("triton"), fake.timing("triton", steps=3, batch=3)])
    assert plots.steps(made, "layer", "forward") is None
    assert plots.memory(made) is None
    assert plots.history([made, made]) is None


def test_history_runs_from_old_to_new(record: Any, fake: SimpleNamespace) -> None:
    records = []
    for day, time in ((9, 0.5), (1, 1.0), (4, 0.75)):
        rows = [
            fake.timing("triton", time),
            fake.timing("triton", 99.0, batch=1),
            fake.timing("triton", 99.0, precision="tf32")
            if day == 9
            else fake.without_figures("failed", "no", path="triton", precision="tf32"),
        ]
        records.append(record(rows, date=f"2026-12-0{day}T00:00:00Z"))
    figure = plots.history(records)
    (fp32, tf32) = figure.axes
    assert [(date.day, time) for date, time in lines(fp32)["triton"]] == [(1, 1.0), (4, 0.75), (9, 0.5)]
    assert [(date.day, time) for date, time in lines(tf32)["triton"]] == [(9, 99.0)]
    assert (fp32.get_ylabel(), fp32.get_xlabel()) == ("GPU time (ms)", "date of the record (UTC)")
    assert fp32.get_title(loc="left") == "fp32, forward"
    assert "newest record: Test Card, 2026-12-09" in texts(figure)


def test_panels_without_a_value_say_so(record: Any, fake: SimpleNamespace) -> None:
    records = [
        record(
            [fake.timing("triton", 1.0), fake.timing("triton", 1.0, precision="tf32", work="forward+backward")],
            date=f"2026-12-0{day}T00:00:00Z",
        )
        for day in (1, 2)
    ]
    figure = plots.history(records)
    empty = [
        axes.get_title(loc="left") for axes in figure.axes if [t.get_text() for t in axes.texts] == ["not measured"]
    ]
    assert empty == ["fp32, forward+backward", "tf32, forward"]


def test_pictures_are_written(results: Path, fake: SimpleNamespace) -> None:
    rows = []
    for i, path in enumerate(("nn.GRU", "triton", "resident")):
        for shape in ({}, {"batch": 1}, {"batch": 4096}, {"steps": 1}, {"hidden": 16}):
            for group, works in (("layer", ("forward", "forward+backward")), ("recurrence", ("forward", "backward"))):
                rows += [fake.timing(path, 0.3 / (i + 1), group=group, work=work, **shape) for work in works]
    for day in (1, 2):
        (results / f"{day}.json").write_text(json.dumps(fake.gpu_record(rows, date=f"2026-12-0{day}T00:00:00Z")))
    out = results.parents[1] / "PERFORMANCE.md"
    document, *pictures = write_performance(results, out)[0]
    names = [
        "speed-forward",
        "speed-forward-backward",
        "steps-recurrence-forward",
        "steps-recurrence-backward",
        "steps-layer-forward",
        "steps-layer-forward-backward",
        "memory",
        "history",
    ]
    folder = out.parent / "docs" / "images" / "performance"
    assert pictures == [folder / f"test-card-{name}.png" for name in names]
    text = document.read_text(encoding="utf-8")
    first = {}
    for path in pictures:
        assert f"](docs/images/performance/{path.name})" in text
        first[path] = path.read_bytes()
        assert first[path].startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", first[path][16:24])
        assert width == round(figures.WIDTH_IN * figures.DPI)
        assert 300 < height < 2000
    write_performance(results, out)
    assert {path: path.read_bytes() for path in pictures} == first


def test_labels_of_close_sizes_do_not_collide(record: Any, fake: SimpleNamespace) -> None:
    sizes = (*range(100, 132), 1024)
    figure = plots.steps(record([fake.timing("triton", 0.1, hidden=hidden) for hidden in sizes]), "layer", "forward")
    ticks = figure.axes[2].get_xticks()
    assert set(ticks) <= set(sizes)
    assert len(ticks) <= 8
    assert min(math.log(b / a) for a, b in itertools.pairwise(ticks)) > 0.1
