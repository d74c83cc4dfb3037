"""What the kernels compile to: reading the machine code, which configurations are compiled, the exit code."""

import json
from dataclasses import replace

import pytest
import torch
from support import compiled_apart

pytest.importorskip("triton")

from bigru.kernels import registry, resources
from bigru.kernels.config import H100, Call, choose_resident, choose_triton
from bigru.kernels.resources import Case, Usage

# In the loop a fence, which is no barrier. Before it a shorter loop, behind the last exit a wait that branches back.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                   /* 0x00000a0000017a02 */
                                                                            /* 0x000fe40000000f00 */
        /*0010*/               @P1 BRA 0x0 ;                                /* 0xfffffff000001947 */
        /*0020*/                   LDS R2, [R3] ;                           /* 0x0000000003027984 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0000000000007b1d */
        /*0040*/              @!P0 BRA 0xa0 ;                               /* 0x0000005000008947 */
        /*0050*/                   MEMBAR.ALL.CTA ;                         /* 0x0000000000007992 */
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0000000000007b1d */
        /*0070*/               @P2 BRA.U UP0, 0x20 ;                        /* 0xffffffa000002947 */
        /*0080*/               @P3 EXIT ;                                   /* 0x000000000000394d */
        /*0090*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;            /* 0x0000000000007b1d */
        /*00b0*/                   BRA 0x10 ;                               /* 0xffffff5000007947 */
        /*00c0*/                   BRA 0xc0;                                /* 0xfffffff000007947 */

Resource usage:
 Function gru_forward_kernel:
  REG:72 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
FULL = Call(H100, torch.float32, 128)
CASE = Case("sm_90", "triton", "forward", 128, "fp32", "fp32", choose_triton(FULL, 1))
FITS = Usage(registers=128, spilled=0, shared=200_000, instructions=100, barriers=1)
BAD = {
    "spills": (replace(FITS, spilled=8), "spills 8 bytes"),
    "too much shared memory": (replace(FITS, shared=H100.shared_memory + 1), "needs 232449 bytes"),
    "does not compile": (Usage(error="PTXASError: no"), "does not compile: PTXASError: no"),
}


def test_usage_and_the_step_are_read_from_the_listing():
    assert resources.read_usage(LISTING) == (72, 16)
    with pytest.raises(ValueError, match="no resource usage"):
        resources.read_usage("Fatbin elf code:")
    # The largest loop before the last exit.
    assert resources.read_step(LISTING) == (6, 2)
    assert resources.read_step("/*0000*/  MOV R1, R2 ;\n/*0010*/  EXIT ;\n") == (0, 0)


def test_usage_of_an_amd_gpu():
    text = "  - .private_segment_fixed_size: {}\n    .sgpr_spill_count: 0\n"
    text += "    .vgpr_count:     64\n    .vgpr_spill_count: {}\n"
    assert resources.read_amd_usage(text.format(0, 0)) == (64, 0)
    assert resources.read_amd_usage(text.format(20, 4)) == (64, 20)


def test_every_choice_is_listed_once():
    cases = resources.shipped(resources.DEVICES)
    assert len(cases) == len(set(cases))
    assert {case.arch for case in cases} == set(resources.DEVICES)
    assert {case.arch for case in resources.shipped(["sm_80"])} == {"sm_80"}
    both = ("triton persistent", "triton streamed", "resident", "cooperative")
    forms = [form + ending for form in both for ending in ("", ", varlen")]
    kernels = {f"{way} {form}" for way in ("forward", "backward") for form in forms}
    assert {case.name for case in cases} == kernels | {
        "forward resident, inference",
        "mend triton streamed",
        "mend triton streamed, varlen",
        "gather triton",
        "collect triton",
    }
    assert {(case.storage, case.precision) for case in cases} == {
        ("fp32", "fp32"),
        ("fp32", "tf32"),
        ("bf16", "fp32"),
        ("fp16", "fp32"),
    }
    listed = {case.config for case in cases}
    for device in resources.DEVICES.values():
        for hidden in (*range(1, 140), 192, 255, 256, 257, 512):
            for dtype, precision in resources.MODES:
                call = Call(device, dtype, hidden, precision)
                for batch in (1, 64, 500, 600, 5000):
                    for kernel in (registry.get("triton"), registry.get("resident")):
                        if kernel.refusal(call) is None:
                            assert kernel.choose(call, batch) in listed, (call, batch)


@pytest.mark.parametrize(("usage", "reason"), BAD.values(), ids=BAD.keys())
def test_the_row_with_a_problem_is_named(usage, reason, capsys):
    assert resources.verdict([CASE], [FITS]) == 0
    assert resources.verdict([CASE, CASE], [FITS, usage]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "sm_90 forward triton persistent, H=128, fp32 storage" in line
    assert reason in line


class TestBudget:
    def case(self, direction="backward", **change):
        config = choose_resident(replace(FULL, precision="tf32"), 1)
        return replace(Case("sm_90", "resident", direction, 128, "fp32", "tf32", config), **change)

    def test_of_a_version_and_only_where_it_is_stated(self):
        assert resources.budget(self.case(), (3, 6)) == (310, 1)
        assert resources.budget(self.case(), (3, 10)) == (356, 1)
        assert resources.budget(CASE, (3, 6)) == (470, 2)
        assert resources.budget(CASE, (3, 9)) == (540, 4)
        assert resources.budget(replace(CASE, storage="bf16"), (3, 9)) == (390, 2)
        wide = choose_resident(replace(FULL, dtype=torch.bfloat16), 4096)
        unstated = {"arch": "sm_80"}, {"hidden": 64}, {"storage": "bf16", "config": wide}
        assert not any(
            map(resources.budget, [replace(CASE, save=False), *(self.case(**change) for change in unstated)])
        )

    def test_above_it_is_a_problem(self):
        def problem(**change):
            return resources.problem(self.case("forward", save=False), replace(FITS, **change), (3, 6))

        assert problem(instructions=200) is None
        assert "takes 201 instructions and 1 barriers" in problem(instructions=201)
        assert "takes 100 instructions and 3 barriers" in problem(barriers=3)


@pytest.mark.parametrize(("usage", "code"), [(FITS, 0), (BAD["spills"][0], 1)], ids=["fits", "spills"])
def test_command_prints_the_table_and_writes_the_rows(usage, code, tmp_path, capsys):
    arguments = ["--arch", "sm_90", "--json", str(tmp_path / "rows.json")]
    measured = lambda cases, jobs: [usage] * len(cases)  # noqa: E731
    assert resources.main(arguments, interpreted=False, compile_all=measured) == code
    lines = capsys.readouterr().out.splitlines()
    record = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert f"{len(record['rows'])} kernels" in lines[0]
    assert sum(line.startswith("sm_90 ") for line in lines) == len(record["rows"])
    assert {row["limit"] for row in record["rows"]} == {H100.shared_memory}
    assert {row["problem"] is None for row in record["rows"]} == {code == 0}


def test_interpreted_kernels_are_refused(capsys):
    assert resources.main([], interpreted=True) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.slow
def test_smallest_kernel_compiles(tmp_path):
    code = (
        "from bigru.kernels import resources as r; case = r.shipped(['sm_90'])[0]; usage = r.measure(case); "
        "assert r.problem(case, usage) is None, usage; assert usage.registers > 16 and usage.shared > 0, usage; "
        "assert usage.instructions > 50 and usage.barriers > 0, usage"
    )
    compiled_apart(code, tmp_path)
