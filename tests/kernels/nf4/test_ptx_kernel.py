"""The compiled NF4 decoders, executed thread by thread without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compile.ptx_emulator import PtxError
from bench.compile.ptx_kernel import Memory, execute, steps

ROOT = Path(__file__).parents[3]

# A copy of 4 bytes per thread, of threads below %r4, as Triton writes one.
COPY = """
.visible .entry copy(.param .u64 copy_param_0, .param .u64 copy_param_1)
.reqntid 32
{
    .reg .pred %p<2>; .reg .b32 %r<5>; .reg .b64 %rd<6>; // a comment; with a semicolon
    .loc 1 7 0
$L__tmp0:
    ld.param.b64 %rd1, [copy_param_0];
    ld.param.b64 %rd2, [copy_param_1];
    mov.u32 %r1, %tid.x;
    cvt.u64.u32 %rd3, %r1;
    setp.lt.s64 %p1, %rd3, 20;
    mad.wide.u32 %rd4, %r1, 4, %rd1;
    mad.wide.u32 %rd5, %r1, 4, %rd2;
    mov.u32 %r2, 0x0;
    @%p1 ld.global.b32 { %r2 }, [ %rd4 + 0 ];
    @%p1 st.global.b32 [ %rd5 + 0 ], { %r2 };
    ret;
}
"""


def copied(ptx: str) -> torch.Tensor:
    memory, source, target = Memory(4096), torch.arange(20.0), torch.full((24,), 7.0)
    where = memory.store(source), memory.store(target)
    execute(steps(ptx), where, memory, (1, 1), 32)
    return memory.tensor(where[1], target)


def emulated(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one Triton's interpreter has taken the compiler's place."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile.emulate_nf4", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_compiled_decoders_give_the_bits_of_the_reference() -> None:
    done = emulated()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is right") == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [("shl.b32", "shr.u32"), ("setp.lt.s64", "setp.le.s64"), ("%ctaid.x", "%ctaid.y")],
)
def test_a_fault_planted_in_the_compiled_code_shows(old: str, new: str) -> None:
    done = emulated("--replace", old, new)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert not any("is right" in line or "has no" in line for line in lines), done.stdout


def test_threads_copy_what_their_predicate_lets_them() -> None:
    assert torch.equal(copied(COPY), torch.tensor([*range(20), *[7] * 4], dtype=torch.float32))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("%rd4, %r1, 4", "%rd4, %r1, 2", "not aligned"),
        ("%rd5, %r1, 4", "%rd5, %r1, 0", "written twice"),
        ("%rd3, 20", "%rd3, 21", "outside every tensor"),
        ("cvt.u64.u32 %rd3, %r1", "cvt.u64.u32 %rd3, %r4", "before it is written"),
        ("cvt.u64.u32", "popc.b32", "unknown instruction"),
        ("[ %rd4 + 0 ]", "[ 4096 ]", "not an address"),
    ],
)
def test_what_no_right_kernel_does_is_refused(old: str, new: str, reason: str) -> None:
    assert old in COPY
    with pytest.raises(PtxError, match=reason):
        copied(COPY.replace(old, new))
