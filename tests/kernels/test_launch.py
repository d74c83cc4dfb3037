"""Which kernel serves what, and with which parameters."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bigru.kernels import launch, proven
from bigru.kernels.launch import A100, B200, H100, ResidentConfig

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


class TestRefusal:
    def test_an_old_gpu(self):
        old = replace(A100, capability=(7, 5))
        for kernel in launch.KERNELS:
            refusal = launch.refusal(kernel, 128, torch.float32, "fp32", old)
            assert "compute capability is 7.5, and the kernels need 8.0" in refusal

    def test_a_dtype(self):
        for kernel in launch.KERNELS:
            assert "float64" in launch.refusal(kernel, 128, torch.float64, "fp32", H100)

    def test_sizes(self):
        assert launch.refusal("resident", 128, torch.float32, "fp32", H100) is None
        assert "hidden_size is 129" in launch.refusal("resident", 129, torch.float32, "fp32", H100)
        assert launch.refusal("portable", 4096, torch.float32, "fp32", H100) is None


class TestChooseResident:
    def test_a_small_batch_is_spread_over_the_processors(self):
        assert launch.choose_resident(128, torch.float32, "fp32", 64, H100) == ResidentConfig(4, 128, True)
        assert launch.choose_resident(128, torch.float32, "tf32", 64, H100) == ResidentConfig(8, 128, False)
        assert launch.choose_resident(100, torch.bfloat16, "fp32", 64, H100) == ResidentConfig(8, 128, False)

    def test_a_large_batch_takes_wider_blocks_where_registers_allow(self):
        assert launch.choose_resident(128, torch.bfloat16, "fp32", 4096, H100) == ResidentConfig(16, 128, False)
        assert launch.choose_resident(128, torch.float32, "fp32", 4096, H100) == ResidentConfig(4, 128, True)
        assert launch.choose_resident(64, torch.float32, "fp32", 4096, H100) == ResidentConfig(8, 64, True)
        # 257 programs of eight rows, where two fit on a processor.
        assert launch.choose_resident(64, torch.float16, "fp32", 1025, H100) == ResidentConfig(8, 64, False)

    def test_a_warp_for_every_16_units(self):
        assert launch.choose_resident(3, torch.float32, "fp32", 1, B200).options()["num_warps"] == 1
        assert launch.choose_resident(128, torch.float32, "fp32", 1, B200).options()["num_warps"] == 8


def unproven(entry, record):
    """What of an entry the record does not show right, on this architecture, storage and precision."""
    rows = [
        row
        for row in record["correctness"]
        if row["kernel"] == entry.kernel
        and row["dtype"] == entry.dtype
        and (entry.dtype != "float32" or row["precision"] == entry.precision)
    ]
    if record["kind"] != "gpu" or tuple(record["machine"]["capability"]) != entry.capability:
        return "another machine"
    if any(row["status"] == "failed" or row["deterministic"] is False for row in rows):
        return "a row that failed"
    return set(entry.hidden) - {row["hidden"] for row in rows if row["status"] == "passed"}


class TestProven:
    def test_every_entry_stands_on_a_committed_record(self):
        for entry in proven.PROVEN:
            assert not unproven(entry, json.loads((RESULTS / entry.record).read_text(encoding="utf-8"))), entry

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({}, set()),
            ({"hidden": 96}, {64}),
            ({"status": "refused", "deterministic": None}, {64}),
            ({"status": "failed"}, "a row that failed"),
            ({"deterministic": False}, "a row that failed"),
            ({"precision": "tf32"}, {64}),
            ({"kernel": "portable"}, {64}),
        ],
    )
    def test_what_a_record_shows(self, change, found):
        entry = proven.Proven("resident", (9, 0), (64,), "float32", "fp32", "card.json")
        row = {
            "kernel": "resident",
            "dtype": "float32",
            "precision": "fp32",
            "hidden": 64,
            "status": "passed",
            "deterministic": True,
        }
        record = {"kind": "gpu", "machine": {"capability": [9, 0]}, "correctness": [row | change]}
        assert unproven(entry, record) == found
        record["machine"]["capability"] = [8, 0]
        assert unproven(entry, record) == "another machine"

    def test_16_bit_storage_has_no_precision(self):
        entry = proven.Proven("resident", (9, 0), (64,), "bfloat16", "fp32", "card.json")
        assert entry.covers(64, "bfloat16", "tf32", (9, 0))
        assert not entry.covers(65, "bfloat16", "fp32", (9, 0))
        assert not entry.covers(64, "float16", "fp32", (9, 0))
        assert not entry.covers(64, "bfloat16", "fp32", (8, 0))
