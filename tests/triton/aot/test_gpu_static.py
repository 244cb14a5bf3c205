"""The static report: loops read from machine code, the model, and the command itself."""

import json
from collections import Counter

import pytest
import torch

from bench import gpu_static
from bench.compiled import compiling_for, examine
from bench.gpu_launches import LAUNCHES, Case
from bench.gpu_model import RATES, flops_of, predict, transferred
from bench.gpu_static import flops_of_tile
from bench.machine_code import loops_of, parse_amd, parse_sass

# 128 rows against 128 columns of 128 features in 8 warps of an H100: 1024 clocks of products and
# as many of exponentials, 64 a thread.
TILE = Counter({"HGMMA.64x128x16.F32.BF16.RS": 8, "MUFU.EX2": 64, "FFMA": 64, "FADD": 64})
FLOPS = 2 * 128 * 128 * 128


def test_model_counts_clocks_of_each_unit():
    p = predict(TILE, 90, 8, 2, flops=FLOPS)
    assert p.clocks["tensor"] == 1024 and p.clocks["exp"] == 1024
    assert p.clocks["fp32"] == 128 * 8 * 32 / 128
    assert p.clocks["issue"] == 200 * 8 / 4
    assert p.clocks["shared"] == 8 * 2 * 16 * 128 * 2 / 128  # B, read by each of two warp groups
    assert p.of == "tensor" and p.overlapped == 1.0 and p.alone == 0.5


def test_more_exponentials_make_a_loop_exp_bound():
    p = predict(TILE + Counter({"MUFU.EX2": 64}), 90, 8, 2, flops=FLOPS)
    assert p.bound == "exp" and p.overlapped == 0.5
    assert p.predicted == pytest.approx(0.75 * 0.5)
    assert predict(TILE, 90, 8, 2, flops=2 * FLOPS).bound == "tensor"


def test_more_instructions_of_other_kinds_bind_their_own_unit():
    assert predict(TILE + Counter({"ISETP.GE.AND": 500}), 90, 8, 2, flops=FLOPS).bound == "alu"
    # From sm_86 on four schedulers issue as many multiply-adds as there are lanes for.
    assert predict(TILE + Counter({"FFMA": 600}), 80, 8, 2, flops=FLOPS).bound == "fp32"
    assert predict(TILE + Counter({"UMOV": 900}), 90, 8, 2, flops=FLOPS).bound == "issue"
    assert predict(TILE + Counter({"LDS.128": 64}), 90, 8, 2, flops=FLOPS).bound == "shared"
    p = predict(TILE + Counter({"LDGSTS.E.BYPASS.128": 20}), 90, 8, 2, flops=FLOPS)
    assert p.bound == "memory" and p.clocks["memory"] == 20 * 8 * 512 / 28


def test_a_block_alone_does_not_overlap():
    one, two = (predict(TILE, 90, 8, blocks, flops=FLOPS) for blocks in (1, 2))
    assert one.predicted == two.predicted / 2


def test_where_l2_is_not_known_memory_is_no_unit():
    assert RATES[100].l2 is None
    assert "memory" not in predict(TILE, 100, 8, 2, flops=FLOPS).clocks


def test_streaming_loops_are_set_against_device_memory():
    loop = Counter({"LDG.E.128": 8, "FFMA": 16})
    p = predict(loop, 90, 4, 8, products=False)
    assert p.of == p.bound == "memory" and p.overlapped == 1.0
    assert p.clocks["memory"] == pytest.approx(8 * 4 * 512 / 13.9)
    assert predict(loop + Counter({"FFMA": 20000}), 90, 4, 8, products=False).overlapped < 0.1


def test_sizes_in_names_of_instructions():
    assert flops_of("HGMMA.64x128x16.F32.BF16.SS") == 2 * 64 * 128 * 16
    assert flops_of("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    assert flops_of("v_mfma_f32_32x32x8_bf16") == 2 * 32 * 32 * 8
    assert flops_of("UTCHMMA") is None
    for opcode, size in {
        "LDS.128": 16, "STS": 4, "LDG.E.64": 8, "LDG.E.U16": 2, "LDSM.16.M88.4": 16,
        "LDSM.16.MT88.2": 8, "ds_read_b128": 16, "ds_read2_b32": 8, "ds_read2st64_b64": 16,
        "global_load_dwordx4": 16, "global_load_ushort": 2, "buffer_load_dword": 4,
    }.items():  # fmt: skip
        assert transferred(opcode) == size, opcode


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, 1 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, R136, gdesc[UR12], RZ, !UPT ;
        /*0030*/              @!P2 BRA 0x70 ;
        /*0040*/                   FSEL R2, R2, RZ, P0 ;
        /*0050*/                   FSEL R3, R3, RZ, P0 ;
        /*0060*/                   FSEL R3, R3, RZ, P0 ;
        /*0070*/                   BRA.U UP0, 0xb0 ;
        /*0080*/                   MUFU.EX2 R2, R2 ;
        /*0090*/                   MUFU.EX2 R3, R3 ;
        /*00a0*/                   BRA 0xd0 ;
        /*00b0*/                   MUFU.EX2 R2, R2 ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4 ;
        /*00d0*/              @!P1 BRA 0x130 ;
        /*00e0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88 ;
        /*00f0*/               @P0 BRA 0x10 ;
        /*0100*/                   NOP ;
        /*0110*/                   EXIT ;
        /*0120*/                   BRA 0x120;
        /*0130*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4 ;
        /*0140*/              @!P1 BRA 0x130 ;
        /*0150*/                   BRA 0xe0 ;
"""


def test_the_cheapest_trip_leaves_masks_and_waits_out():
    (loop,) = loops_of(parse_sass(SASS))
    assert loop.inner == []
    assert loop.own == Counter(
        {
            "FADD": 1, "HGMMA.64x64x16.F32.BF16.RS": 1, "HGMMA.64x64x16.F32.BF16.SS": 1,
            "BRA": 3, "BRA.U": 1, "MUFU.EX2": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1,
        }
    )  # fmt: skip


AMD = """
\ts_branch .LBB0_2
.LBB0_1:
\tv_add_f32 v1, v1, v2
\tv_add_f32 v1, v1, v2
\tv_add_f32 v1, v1, v2
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_9
\tv_mul_f32 v1, v1, v2
\tv_mul_f32 v1, v1, v2
\ts_cbranch_vccz .LBB0_4
\tv_exp_f32 v1, v1
\tv_exp_f32 v1, v1
\tv_exp_f32 v1, v1
.LBB0_4:
\ts_cbranch_vccnz .LBB0_1
\tv_exp_f32 v1, v1
\ts_branch .LBB0_1
.LBB0_9:
\ts_endpgm
"""


def test_a_way_around_both_alternatives_is_not_taken():
    """The loop's header is not its first block; a way without exponentials would be shorter."""
    (loop,) = loops_of(parse_amd(AMD))
    assert loop.own["v_exp_f32"] == 1 and loop.own["v_add_f32"] == 3
    assert loop.own["v_mfma_f32_32x32x8_bf16"] == 1 and "s_endpgm" not in loop.own


def product_reports(d, target, dtype=torch.bfloat16):
    names = "rows_kernel", "gradient_kernel", "weights_kernel", "sums_kernel"
    with compiling_for(target, names.__contains__) as launches:
        LAUNCHES["similarity_lse"](Case(d, dtype, n=4096))
    return [
        examine(launch) for launch in {launch.kernel.hash: launch for launch in launches}.values()
    ]


@pytest.mark.parametrize("target", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("d", [128, 1024])
def test_tensor_instructions_of_a_tile_are_those_of_the_algorithm(target, d):
    """Nothing is padded or done twice that the report does not say."""
    reports = product_reports(d, target)
    assert {report.name for report in reports} == (
        {"rows_kernel", "gradient_kernel"} if d == 128 else
        {"rows_kernel", "weights_kernel", "sums_kernel"}
    )  # fmt: skip
    for report in reports:
        executed = gpu_static.tensor_work(gpu_static.tile_of(report, d), report)
        needed = gpu_static.tensor_work_needed(report, d)
        if report.name == "rows_kernel":
            # Of the 16 blocks of 64 features compilers may take one or two out of the inner loop.
            trips = gpu_static.trips_of(report, d)
            assert (13 if d == 1024 else 0) < trips <= d // 64, str(report)
        if (target, report.name) == ("gfx942", "gradient_kernel"):
            # Eight warps share the four 32 × 32 pieces of a tile of scores: the report says so.
            assert executed >= needed
            row = gpu_static.row_of("", Case(d), report)
            share = flops_of_tile(report.name, report.options, d)[1]
            assert row.useful == pytest.approx(share * needed / executed)
        else:
            assert executed == needed, str(report)


def test_useful_share():
    gradient = dict(BLOCK_X=64, BLOCK_Y=64, BLOCK_D=128, PRECISION="ieee")
    assert flops_of_tile("gradient_kernel", gradient, 128) == (2 * 64 * 64 * 256, 1.0)
    rows = dict(BLOCK_N=64, BLOCK_M=64, BLOCK_D=128, PRECISION="ieee")
    assert flops_of_tile("rows_kernel", rows, 100)[1] == 100 / 128
    mean = dict(gradient, BLOCK_D=32, BLOCK_V=128)
    assert flops_of_tile("mean_kernel", mean, 100) == (2 * 64 * 64 * 256, 200 / 256)
    # 300 features are five blocks of 64 for the weights, and three of 128 for the sums.
    weights = dict(gradient, BLOCK_D=64)
    assert flops_of_tile("weights_kernel", weights, 300) == (2 * 64 * 64 * 320, 300 / 320)
    sums = dict(BLOCK_X=64, BLOCK_V=128, BLOCK_Y=64)
    assert flops_of_tile("sums_kernel", sums, 300) == (2 * 64 * 64 * 128, 300 / 384)


def test_command(tmp_path, capsys):
    path = tmp_path / "static.json"
    command = ["similarity_lse", "cosine", "--arch", "90,gfx942", "--d", "128", "--json", str(path)]
    assert gpu_static.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Predictions of a static model of compiled code, not measurements")
    content = json.loads(path.read_text())
    assert content["note"] == gpu_static.NOTE
    rows = {(row["kernel"], row["target"]): row for row in content["rows"]}
    for row in rows.values():
        assert row["spill_bytes"] == 0 and row["blocks"] >= 1
        assert 0 < row["prediction"]["predicted"] <= 0.75
        assert f"{row['registers']:>5}" in printed
    assert rows["rows", 90]["tensor"] == 8 and rows["rows", "gfx942"]["tensor"] == 16
    assert rows["gradient own", 90]["exponentials"] == 32  # one a score
    assert rows["forward", 90]["prediction"]["of"] == "memory"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["similarity"], "unknown kernel 'similarity'. Kernels: similarity_lse, self_"),
        (["--arch", "90,91"], "unknown architecture '91'. Architectures: 80, 86, 89, 90, 100, "),
        (["--d", "128,x"], "--d takes positive numbers such as 128,256; got '128,x'."),
    ],
)
def test_typing_errors_get_one_line(arguments, said, capsys):
    assert gpu_static.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m bench gpu-static: {said}") and error.count("\n") == 1
