"""Compile the NF4 decoders and execute their machine code without a GPU.

    python -m bench.compile.emulate_nf4           the checked configuration of each kernel
    python -m bench.compile.emulate_nf4 --all     every configuration that decodes by inline PTX
    ... --replace OLD NEW                 with a fault planted in the PTX

`bench.compile.ptx_kernel` executes the PTX, every thread of it. The result must be the reference's
bits, with nothing written outside it, nothing twice, and no access that is unaligned or outside a
tensor.
Part of the rows and columns is decoded, into a wider matrix, and the last program is partly empty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.compile.cases import CompileCase
from bench.compile.ptx_emulator import PtxError
from bench.compile.ptx_kernel import Memory, execute, steps
from kernels.nf4 import NF4Weight, dequantize, quantize
from kernels.nf4.decode_ptx import INTERPRETED
from kernels.nf4.dequantize_triton import nested_arguments
from kernels.nf4.planar import to_planar
from kernels.runtime.triton_support import cdiv

ARCHITECTURE = 80
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Multiples of 16, as the cases are compiled for; blocks of 64 columns from the 16th on.
_ROWS, _FIRST, _LAST, _PITCH = 560, 16, 544, 576
_BLOCKS, _FIRST_BLOCK, _LAST_BLOCK = 19, 16, 19
_CHUNKS = (3, 544)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile.emulate_nf4", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--all", action="store_true", help="every configuration")
    parser.add_argument("--replace", nargs=2, metavar=("OLD", "NEW"), help="a fault in the PTX")
    options = parser.parse_args(given)
    if INTERPRETED:
        parser.error("compiling needs a shell without TRITON_INTERPRET")
    faults = 0
    for case in chosen(options.all):
        fault = fault_of(case, options.replace)
        faults += fault is not None
        print(f"{case.name} [{case.config}] {fault or 'is right'}", flush=True)
    return 1 if faults else 0


def chosen(every: bool) -> Iterator[CompileCase]:
    """The cases of decoders that have a limit, which are those by inline PTX."""
    from bench.compile.cases.nf4 import compile_cases

    for case in compile_cases():
        if case.name.startswith("nf4_dequantize") and case.limits and (every or case.checked):
            yield case


def fault_of(case: CompileCase, replace: Sequence[str] | None = None) -> str | None:
    """What is wrong with the machine's result of `case`; `replace` in its PTX beforehand."""
    from bench.compile.report import compile_case

    _, stages, _ = compile_case(case, ARCHITECTURE)
    text = str(stages["ptx"])
    if replace is not None:
        old, new = replace
        if old not in text:
            return f"has no {old!r} in its PTX"
        text = text.replace(old, new)
    torch.manual_seed(0)
    shape = (_ROWS, 64 * _BLOCKS)
    nested = bool(case.constexprs["NESTED"])
    weight = quantize(torch.randn(shape), double_quant=nested)
    memory = Memory(8 << 20)
    out, expected, arguments, grid = _launch(case, weight, memory)
    try:
        execute(steps(text), arguments, memory, grid, 32 * case.num_warps)
    except PtxError as error:
        return str(error)
    result = memory.tensor(out, expected).view(torch.int16)
    apart = int((result != expected.view(torch.int16)).sum())
    return f"has {apart} wrong elements" if apart else None


def _launch(
    case: CompileCase, weight: NF4Weight, memory: Memory
) -> tuple[int, Tensor, list[int], tuple[int, int]]:
    """Address of the result, the buffer it lies in as it should be, arguments and grid."""
    dtype = _DTYPES[case.config.split()[0]]
    dense, rows = dequantize(weight, dtype), int(str(case.constexprs["ROWS"]))
    part = dense[_FIRST:_LAST, 64 * _FIRST_BLOCK : 64 * _LAST_BLOCK]
    planar = to_planar(weight)
    if case.name == "nf4_dequantize_flat":
        first, last = _CHUNKS
        expected = torch.full_like(dense.view(-1), 7.0)
        before = expected.clone()
        expected[64 * first : 64 * last] = dense.view(-1)[64 * first : 64 * last]
        sizes = [dense.numel(), weight.shape[1], _ROWS, first, last]
        grid = (cdiv(last - first, rows * int(str(case.constexprs["STEPS"]))), 1)
        sources = [weight.packed, weight.absmax, *nested_arguments(weight)]
    else:
        transposed = case.name == "nf4_dequantize_transposed"
        shape = (part.shape[1], _PITCH) if transposed else (part.shape[0], 256)
        before = torch.full(shape, 7.0, dtype=dtype)
        expected = before.clone()
        inside = part.T if transposed else part
        expected[: inside.shape[0], : inside.shape[1]] = inside
        ends = [] if transposed else [_LAST_BLOCK]
        sizes = [_ROWS, _BLOCKS, _FIRST, _LAST, _FIRST_BLOCK, *ends, shape[1]]
        across = 1 if transposed else int(str(case.constexprs["STEPS"]))
        grid = (cdiv(_LAST - _FIRST, rows), cdiv(_LAST_BLOCK - _FIRST_BLOCK, across))
        sources = [planar.codes, planar.absmax, *nested_arguments(planar)]
    addresses = [memory.store(source.reshape(-1)) for source in sources]
    out = memory.store(before)
    return out, expected, [*addresses, out, *sizes], grid


if __name__ == "__main__":
    sys.exit(main())
