"""bench/counts.py: how it reads callgrind and objdump, and a toy run."""

import json
import shutil

import pytest

import counts
from support import ROOT
from support.scripts import run_script

BENCH = ROOT / "bench"

# Two tokens, each four bytes broadcast, against a vector of 16 columns; an outer loop around it that begins with a load
# from the stack.
DISASSEMBLY = """
0000000000000010 <void prequant::avx512::multiply_tile<2>(unsigned char const*, long) [clone .cold]>:
  10:\tmov    (%rsp),%rcx
  14:\tnopw   0x0(%rax,%rax,1)
  18:\tvmovdqa64 (%rdx),%zmm0
  1e:\tvpbroadcastd (%rax),%zmm1
  24:\tvpdpbusd %zmm0,%zmm1,%zmm16
  2a:\tvpbroadcastd (%rax,%rcx,1),%zmm2
  30:\tvpdpbusd %zmm0,%zmm2,%zmm17
  36:\tadd    $0x4,%rax
  3a:\tcmp    %rax,%rsi
  3d:\tjne    18 <void prequant::avx512::multiply_tile<2>(unsigned char const*, long) [clone .cold]+0x8>
  40:\tdec    %rdi
  43:\tjne    10 <void prequant::avx512::multiply_tile<2>(unsigned char const*, long) [clone .cold]>
  46:\tvmovdqa64 %zmm16,(%r8)
  4c:\tret

0000000000000050 <prequant::avxvnni::linear(long)::{lambda(long, int (&)[3])#1}::operator()(long) const>:
  50:\t{vex} vpdpwssd (%rdx),%ymm1,%ymm0
  58:\tadd    $0x20,%rdx
  5c:\tjmp    50 <somewhere>
"""


def test_hottest_inner_loop_and_its_mix():
    loops = counts.hottest_loops(DISASSEMBLY)
    tile, without_broadcast = loops["multiply_tile"], loops["linear::{lambda#1}::operator"]
    assert (tile["tokens"], tile["weights"], tile["instructions"], tile["stack"]) == (2, 64, 8, 0)
    assert tile["per_32_weights"] == {"broadcasts": 1, "loads": 0.5, "others": 1.5, "vpdpbusd": 1}
    assert without_broadcast["weights"] == 16 and without_broadcast["per_32_weights"] == {"others": 4, "vpdpwssd": 2}


def test_total_of_callgrind():
    assert counts.total_instructions("version: 1\nevents: Ir\nfn=(1)\n12 3\ntotals: 4711\n") == 4711
    with pytest.raises(ValueError, match="no total"):
        counts.total_instructions("version: 1\nevents: Ir\n")


def test_missing_tool_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"valgrind is not installed.*apt install"):
        counts.run("valgrind", "--version")


def test_help_has_an_example():
    shown = run_script(BENCH / "counts.py", "--help")
    assert shown.returncode == 0 and "python bench/counts.py --levels portable" in shown.stdout


@pytest.mark.slow
def test_it_counts_a_toy_layer(tmp_path, monkeypatch):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    found = counts.count_level("portable", 32, 64, [("linear_w4a8", 1), ("linear_w4a8", 8)])["instructions_per_weight"]
    assert 0.5 < found["linear_w4a8 M=1"] < found["linear_w4a8 M=8"] < 200


@pytest.mark.exhaustive
@pytest.mark.slow
def test_it_disassembles_avx512(tmp_path):
    if shutil.which("objdump") is None or "avx512" not in counts.LEVELS:
        pytest.skip("objdump is not installed, or this build has no AVX-512")
    loops = counts.count_level("avx512", 0, 0, [])["inner_loops"]
    assert any(loop["per_32_weights"].get("vpdpbusd", 0) > 0 for loop in loops.values())
    assert all(loop["weights"] > 0 for loop in loops.values())


def test_recorded_counts_are_of_levels_that_exist():
    recorded = json.loads(counts.RESULTS.read_text())
    assert set(recorded["levels"]) <= set(counts.LEVELS)
