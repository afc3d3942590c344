"""Kernels compile to lean machine code, and the report notices if not."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compile.cases import ARCHITECTURES, CompileCase
from bench.compile.report import collect, committed_rows, faults_of, regressions
from bench.compile.sass import Disassembly, Instruction, issued, left_in_registers
from bench.compile.table import Row, markdown
from bench.compile.triton_ir import narrow_products, packs_across_rows

ROOT = Path(__file__).parents[2]

GOOD = Row("k", "c", 90, shared_bytes=100, shared_limit=200, instructions=10, per_element=5.0)
STAGES = {"ttir": "", "ttgir": ""}


def listing(*texts: str) -> tuple[Instruction, ...]:
    return tuple(Instruction(16 * i, text) for i, text in enumerate(texts))


MATMUL = listing(
    "MOV R1, R2",
    "HGMMA.64x64x16.F32.BF16 R8, R40, gdesc[UR4], R8",
    "LDGSTS.E [R3], [R4.64]",
    "HGMMA.64x64x16.F32.BF16 R24, R44, gdesc[UR4], R24",
    "NOP",
    "BRA 0x10",
    "EXIT",
)


def case(**changes: object) -> CompileCase:
    plain = CompileCase(kernel=None, name="k", config="c", signature={}, constexprs={})
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_checked_configurations_hold_the_limits_and_the_committed_table() -> None:
    """In a process of its own: in this one Triton's interpreter has taken the compiler's place."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile.report", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_is_checked_and_every_case_is_in_the_committed_table() -> None:
    committed = committed_rows()
    cases = collect()
    assert {case.name for case in cases if case.checked} == {case.name for case in cases}
    missing = [
        (case.name, case.config, arch)
        for case in cases
        for arch in case.architectures
        if (case.name, case.config, arch) not in committed
    ]
    assert not missing
    assert not [row.key for row in committed.values() if row.faults]


def test_instructions_of_the_main_loop_are_counted_without_padding() -> None:
    code = Disassembly(32, 0, MATMUL)
    assert [i.address for i in code.main_loop()] == [16, 32, 48, 64, 80]
    assert issued(code.main_loop()) == 3
    assert Disassembly(32, 0, listing("MOV R1, R2", "BRA 0x0")).main_loop() == ()


def test_a_left_operand_from_shared_memory_is_told_from_one_in_registers() -> None:
    assert left_in_registers(MATMUL)
    shared = listing("HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8")
    assert not left_in_registers(shared)
    assert not left_in_registers((*MATMUL, *shared))
    assert not left_in_registers(())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"local_bytes": 8}, "local memory"),
        ({"local_accesses": 1}, "local memory"),
        ({"shared_bytes": 201}, "shared memory"),
        ({"limit": 4.9}, "limit is 4.9"),
        ({"instructions": 0}, "no machine code"),
    ],
)
def test_each_broken_limit_is_a_fault(change: dict[str, object], fault: str) -> None:
    code = Disassembly(32, 0, MATMUL)
    assert list(faults_of(case(), replace(GOOD, limit=5.0), code, STAGES)) == []
    row = replace(GOOD, **change)  # type: ignore[arg-type]
    (faults,) = faults_of(case(), row, code, STAGES)
    assert fault in faults


def test_a_matmul_needs_tensor_cores_async_copies_and_registers() -> None:
    matmul = case(is_matmul=True, left_in_registers=True)
    good = replace(GOOD, tensor_core="HGMMA")
    assert list(faults_of(matmul, good, Disassembly(32, 0, MATMUL), STAGES)) == []
    faults = list(
        faults_of(matmul, GOOD, Disassembly(32, 0, listing("FFMA R1, R2, R3, R1")), STAGES)
    )
    assert ["tensor-core" in faults[0], "left operand" in faults[1]] == [True, True]
    no_copy = tuple(i for i in MATMUL if i.name != "LDGSTS")
    (fault,) = faults_of(matmul, good, Disassembly(32, 0, no_copy), STAGES)
    assert "asynchronously" in fault


def test_more_instructions_than_committed_are_a_regression() -> None:
    committed = {GOOD.key: GOOD}
    assert regressions([replace(GOOD, per_element=5.4)], committed) == []
    (fault,) = regressions([replace(GOOD, per_element=5.6)], committed)
    assert "committed table 5.0" in fault
    (fault,) = regressions([replace(GOOD, config="new")], committed)
    assert "not in the committed table" in fault


def test_a_fault_that_an_older_compiler_is_known_for_is_no_regression() -> None:
    known = {GOOD.key: replace(GOOD, faults=("spills",))}
    assert regressions([replace(GOOD, faults=("spills",))], known) == []
    (fault,) = regressions([replace(GOOD, faults=("spills", "hangs"))], known)
    assert "hangs" in fault


def test_the_table_of_the_lowest_triton_holds_every_checked_kernel() -> None:
    lowest = re.search(r"^TRITON_LOWEST := triton==(.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert lowest is not None
    rows = committed_rows(ROOT / "bench" / "results" / f"compile_report_{lowest[1]}.json")
    checked = {
        (case.name, case.config, arch)
        for case in collect()
        if case.checked
        for arch in (80, 90, 120)
        if arch in case.architectures
    }
    assert checked <= rows.keys()
    faults = " ".join(fault for row in rows.values() for fault in row.faults)
    assert "does not compile" not in faults and "no machine code" not in faults


def test_a_kernel_that_leaves_the_tensor_cores_is_a_regression() -> None:
    before = replace(GOOD, tensor_core="HMMA")
    assert regressions([replace(GOOD, tensor_core="HGMMA")], {GOOD.key: before}) == []
    (fault,) = regressions([GOOD], {GOOD.key: before})
    assert "lost its tensor-core instructions (HMMA)" in fault


def test_a_type_is_compared_from_the_side_that_every_triton_understands() -> None:
    """Triton 3.3 takes `tl.bfloat16 == DTYPE` for false, and decoded bf16 by fp16's table."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "kernels").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare) and re.fullmatch(r"tl\.\w+", ast.unparse(node.left))
    ]
    assert not wrong


def test_inline_sequences_that_mix_rows_are_faults() -> None:
    inline = (
        '%1 = tt.elementwise_inline_asm "x" {constraints = "=r,r", packed_element = 2 : i32, '
        "pure = true} %0 : tensor<64x16xi16, LAYOUT> -> tensor<64x16xbf16, LAYOUT> loc(#loc1)\n"
    )
    along = "#b = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [16, 2], order = [1, 0]}>"
    down = "#b = #ttg.blocked<{sizePerThread = [8, 1], threadsPerWarp = [2, 16], order = [0, 1]}>"
    alone = "#b = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [2, 16], order = [1, 0]}>"
    operand = "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>"
    assert packs_across_rows(f"{along}\n" + inline.replace("LAYOUT", "#b")) == []
    assert packs_across_rows(inline.replace("LAYOUT", operand)) == []
    for layout in (down, alone):
        assert len(packs_across_rows(f"{layout}\n" + inline.replace("LAYOUT", "#b"))) == 1
    other = inline.replace("LAYOUT", "#ttg.linear<{register = [[1, 0]]}>")
    assert len(packs_across_rows(other)) == 1
    assert packs_across_rows(other.replace("packed_element = 2", "packed_element = 1")) == []
    for bases, safe in (
        ("[0, 1], [0, 2]", True),
        ("[0, 2], [0, 1]", False),
        ("[0, 1], [1, 0]", True),
    ):
        linear = f"#ttg.linear<{{register = [{bases}], lane = [[1, 0]], warp = [], block = []}}>"
        assert (packs_across_rows(inline.replace("LAYOUT", linear)) == []) == safe


def test_a_product_with_a_narrow_program_id_is_a_fault() -> None:
    head = "    %0 = tt.get_program_id x : i32 loc(#loc2)\n"
    wide = "    %1 = arith.extsi %0 : i32 to i64\n    %2 = arith.muli %1, %c64_i64 : i64\n"
    assert narrow_products(head + wide) == []
    narrow = "    %1 = arith.muli %0, %c64_i32 : i32 loc(#loc3)\n"
    assert narrow_products(head + narrow) == ["%1 = arith.muli %0, %c64_i32 : i32"]
    later = "    %1 = arith.remsi %0, %n : i32\n    %2 = arith.muli %1, %c64_i32 : i32\n"
    assert len(narrow_products(head + later)) == 1
    assert narrow_products("    %2 = arith.muli %n, %c64_i32 : i32\n") == []


def test_the_table_shows_each_architecture_once() -> None:
    rows = [replace(GOOD, arch=arch, limit=6.5) for arch in ARCHITECTURES]
    text = markdown(rows, "3.7.1")
    for arch in ARCHITECTURES:
        assert f"| k | {arch} | 1 | 5.00 (6.5) |" in text
    assert "None." in text
    assert "- k [c] sm_90 broken" in markdown([replace(GOOD, faults=("broken",))], "3.7.1")
