"""The registry: which kernel serves what, with which parameters, and which of them "auto" takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bigru.kernels import registry
from bigru.kernels.config import A100, B200, H100, MI300, Call, Device, ResidentConfig, choose_resident, describe

CPU = Device("cpu")
SINGLE = Call(H100, torch.float32, 128)


def kernels():
    pytest.importorskip("triton")
    return [registry.get(name) for name, entry in registry.KERNELS.items() if entry.auto == "cuda"]


def gpu_kernel(name):
    pytest.importorskip("triton")
    return registry.get(name)


class TestRefusal:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"device": replace(A100, capability=(7, 5))}, "compute capability is 7.5, and the kernels need 8.0"),
            ({"dtype": torch.float64}, "float64"),
        ],
    )
    def test_by_every_kernel_of_a_gpu(self, change, words):
        for kernel in kernels():
            assert words in kernel.refusal(replace(SINGLE, **change))

    def test_a_gpu_of_another_maker(self):
        mi300, older = replace(SINGLE, device=MI300), replace(SINGLE, device=replace(MI300, capability=(9, 0)))
        assert [kernel.refusal(mi300) for kernel in kernels()] == ["the GPU is not one of NVIDIA's"] * 2 + [None]
        assert "compiled for gfx942 and gfx1100 only" in gpu_kernel("triton").refusal(older)
        assert registry.choose("auto", mi300).backend == "torch"

    def test_sizes(self):
        assert gpu_kernel("resident").refusal(SINGLE) is None
        assert "hidden_size is 129" in gpu_kernel("resident").refusal(replace(SINGLE, hidden=129))
        assert gpu_kernel("triton").refusal(replace(SINGLE, hidden=4096)) is None
        assert gpu_kernel("cooperative").refusal(replace(SINGLE, hidden=256, varlen=True)) is None

    def test_a_cpu_without_the_interpreter(self):
        on_cpu = replace(SINGLE, device=CPU)
        compiled = replace(gpu_kernel("triton"), interpreted=False)
        assert "the input is on cpu, and the kernel runs on a GPU (or with TRITON" in compiled.refusal(on_cpu)
        assert replace(compiled, interpreted=True).refusal(on_cpu) is None
        assert "the input is on cpu" in gpu_kernel("resident").refusal(on_cpu)

    @pytest.mark.parametrize(
        ("hidden", "dtype", "precision", "served"),
        [
            (64, torch.float32, "fp32", True),
            (65, torch.float32, "fp32", False),
            (64, torch.float32, "tf32", True),
            (128, torch.float32, "tf32", False),
            (128, torch.bfloat16, "fp32", True),
        ],
    )
    def test_lengths_where_w_hh_leaves_registers_for_them(self, hidden, dtype, precision, served):
        call = replace(SINGLE, hidden=hidden, dtype=dtype, precision=precision, varlen=True)
        reason = gpu_kernel("resident").refusal(call)
        assert reason is None if served else "W_hh leaves too few registers for a PackedSequence" in reason

    def test_an_unknown_kernel(self):
        with pytest.raises(ValueError, match=r"kernel: expected one of .* got 'fast'"):
            registry.get("fast")


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    limits = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": {1: H100.shared_memory}[index]})
    about = SimpleNamespace(major=9, minor=0, multi_processor_count=H100.processors)
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=limits)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert describe.__wrapped__(torch.device("cuda")) == describe.__wrapped__(torch.device("cuda:1")) == H100


class TestAuto:
    def test_a_cpu_takes_its_kernel_where_it_is_built(self):
        on_cpu = replace(SINGLE, device=CPU)
        served = registry.get("cpu").refusal(on_cpu) is None
        assert registry.choose("auto", on_cpu)[:3] == ("cpu" if served else "torch", None, None)
        assert registry.choose("auto", replace(on_cpu, dtype=torch.bfloat16))[:3] == ("torch", None, None)

    def test_nothing_is_taken_unproven_on_a_gpu(self):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            backend, refusal, warning, _ = registry.choose("auto", SINGLE, kernels())
        assert (backend, refusal) == ("torch", None)
        assert "no recorded run has proven it on this GPU; backend='triton' takes it all the same" in warning

    @pytest.mark.parametrize(
        ("change", "warns"),
        [
            ({}, True),
            ({"precision": "tf32"}, False),
            ({"dtype": torch.bfloat16}, False),
            ({"device": replace(A100, capability=(7, 5))}, False),
        ],
        ids=["fp32", "tf32", "bf16", "an old GPU"],
    )
    def test_falling_back_warns_where_cudnn_may_be_less_exact(self, change, warns):
        missing = [registry.Missing("triton", "triton")]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            backend, refusal, warning, _ = registry.choose("auto", replace(SINGLE, **change), missing)
        assert (backend, refusal) == ("torch", None)
        assert (warning is not None) == warns
        assert not warns or "(triton is not installed)" in warning
        assert not warns or "its products may be TF32" in warning
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            assert registry.choose("auto", SINGLE, missing)[2] is None


class TestChooseResident:
    @pytest.mark.parametrize(
        ("hidden", "dtype", "precision", "batch", "expected"),
        [
            (128, torch.float32, "fp32", 64, ResidentConfig(4, 128, True)),
            (128, torch.float32, "tf32", 64, ResidentConfig(8, 128, False)),
            (100, torch.bfloat16, "fp32", 64, ResidentConfig(8, 128, False)),
            (128, torch.bfloat16, "fp32", 4096, ResidentConfig(16, 128, False)),
            (128, torch.float32, "fp32", 4096, ResidentConfig(4, 128, True)),
            (64, torch.float32, "fp32", 4096, ResidentConfig(8, 64, True)),
            # 257 programs of eight rows, where two fit on a processor.
            (64, torch.float16, "fp32", 1025, ResidentConfig(8, 64, False)),
        ],
    )
    def test_small_batches_are_spread_and_large_ones_take_wider_blocks(self, hidden, dtype, precision, batch, expected):
        assert choose_resident(Call(H100, dtype, hidden, precision), batch) == expected

    def test_a_warp_for_every_16_units_and_all_registers_where_one_program_fits(self):
        assert choose_resident(Call(B200, torch.float32, 3), 1).options()["num_warps"] == 1
        assert choose_resident(Call(B200, torch.float32, 128), 1).options()["num_warps"] == 8
        assert choose_resident(Call(H100, torch.bfloat16, 128), 1).options()["maxnreg"] == 255
        assert "maxnreg" not in choose_resident(Call(H100, torch.bfloat16, 64), 1).options()

    @pytest.mark.parametrize(
        ("hidden", "dtype", "precision", "limited"),
        [
            (32, torch.float32, "fp32", True),
            (33, torch.float32, "fp32", False),
            (32, torch.float32, "tf32", False),
            (32, torch.float16, "fp32", False),
        ],
    )
    def test_all_registers_for_two_parts_below_64_too(self, hidden, dtype, precision, limited):
        assert ("maxnreg" in choose_resident(Call(H100, dtype, hidden, precision), 1).options()) == limited
