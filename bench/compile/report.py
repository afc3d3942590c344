"""Compile every Triton kernel without a GPU and check its machine code.

    python -m bench.compile.report            all; writes bench/results/compile_report.{json,md}
    python -m bench.compile.report --check    a few, compared with the committed table
    ... --only nf4                            of one module of cases; other rows stay
    ... --older                               a few, into a table of the Triton that runs this

A module in `bench/compile/cases/` lists the cases of a kernel file; that package's docstring shows
how. For each case and architecture the report gives registers, bytes of local memory (spills), the
shared memory of a program against the architecture's limit, instructions per element and thread (of
the main loop for a matmul, of the whole kernel otherwise) and the tensor-core instruction. It fails

* where a kernel does not compile, or touches local memory, or wants too much shared memory;
* on more instructions per element than the case's limit;
* on a matmul without tensor-core instructions, without asynchronous copies in its main loop, or
  (sm_90) whose left operand comes from shared memory although the case says registers;
* on an inline sequence for several elements in a layout that mixes rows, and on an offset
  that a tensor of more than 2^31 elements would overflow (`bench.compile.triton_ir`);
* with `--check`, on 10 % more instructions than the committed table has, and where that names a
  tensor-core instruction and the kernel has none left.

An older Triton that is allowed has a table of its own (`make compile-report-lowest`), in which what
its compiler does worse stands as a fault; there only what is worse than that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from bench.compile import cases as compile_cases
from bench.compile.cases import CompileCase
from bench.compile.sass import (
    ASYNC_COPY,
    LOCAL_MEMORY,
    TENSOR_CORE,
    Disassembly,
    disassemble,
    issued,
    left_in_registers,
)
from bench.compile.table import Row, markdown
from bench.compile.triton_ir import narrow_products, packs_across_rows

RESULTS = Path(__file__).parents[1] / "results"
CHECKED_ARCHITECTURES = (80, 90, 120)
TOLERANCE = 1.10
TABLE = "compile_report"
"""The name of the committed table, of the Triton in constraints.txt."""


@cache
def collect(only: str | None = None) -> tuple[CompileCase, ...]:
    """The cases of every module in `bench.compile.cases`, or of `only` one, in a fixed order."""
    names = sorted(module.name for module in iter_modules(compile_cases.__path__))
    if only is not None:
        names = [name for name in names if name == only]
    modules = [import_module(f"{compile_cases.__name__}.{name}") for name in names]
    cases = tuple(case for module in modules for case in module.compile_cases())
    keys = [(case.name, case.config) for case in cases]
    repeated = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
    if repeated:
        raise ValueError(f"cases of the same name and config: {sorted(repeated)}")
    return cases


def compile_row(case: CompileCase, arch: int) -> Row:
    """Compile `case` for `arch` and judge what came out."""
    from kernels.nf4.tiles import SHARED_MEMORY

    try:
        shared, stages, code = compile_case(case, arch)
    except Exception as error:
        # Whatever stops the compiler is this row's fault, and the others go on.
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        fault = f"does not compile: {type(error).__name__}: {reason}"
        return Row(case.name, case.config, arch, faults=(fault,))
    counted = code.main_loop() if case.is_matmul else code.instructions
    products = {i.text.split()[0].split(".")[0] for i in counted if i.name in TENSOR_CORE}
    share = case.elements / (32 * case.num_warps)
    row = Row(
        kernel=case.name,
        config=case.config,
        arch=arch,
        registers=code.registers,
        local_bytes=code.stack,
        local_accesses=code.count(LOCAL_MEMORY),
        shared_bytes=shared,
        shared_limit=SHARED_MEMORY[arch],
        instructions=issued(code.instructions),
        per_element=round(issued(counted) / share, 2) if share else None,
        limit=case.limits.get(arch),
        tensor_core=" ".join(sorted(products)),
    )
    return replace(row, faults=tuple(faults_of(case, row, code, stages)))


def compile_case(case: CompileCase, arch: int) -> tuple[int, Mapping[str, Any], Disassembly]:
    """Shared memory in bytes, the stages of compilation by name, and machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = set(names) ^ {*case.signature, *case.constexprs}
    if unknown:
        raise ValueError(f"arguments and case disagree on {sorted(unknown)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    multiple_of_16 = [["tt.divisibility", 16]]
    attributes = {
        (index,): multiple_of_16
        for index, name in enumerate(names)
        if signature[name][0] in "*iu" and name not in case.unaligned
    }
    source = ASTSource(
        fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    with _quiet():
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    code = disassemble(compiled.asm["cubin"], folder / "cuobjdump")
    return int(compiled.metadata.shared), compiled.asm, code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's dump of a failing kernel off the terminal: it can be megabytes."""
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as sink:
        try:
            for stream in (1, 2):
                os.dup2(sink.fileno(), stream)
            yield
        finally:
            for stream, old in zip((1, 2), saved, strict=True):
                os.dup2(old, stream)
                os.close(old)


def faults_of(
    case: CompileCase, row: Row, code: Disassembly, stages: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong with the machine code of `case` that `row` sums up."""
    if not row.instructions:
        yield "has no machine code"
    if row.local_bytes or row.local_accesses:
        yield f"uses {row.local_bytes} bytes of local memory in {row.local_accesses} accesses"
    if row.shared_bytes > row.shared_limit:
        yield f"wants {row.shared_bytes} bytes of shared memory, there are {row.shared_limit}"
    if row.per_element is not None and row.limit is not None and row.per_element > row.limit:
        yield f"spends {row.per_element} instructions per element, the limit is {row.limit}"
    for product in narrow_products(stages["ttir"]):
        yield f"multiplies a 32-bit program id: {product}"
    for layout in packs_across_rows(stages["ttgir"]):
        yield f"may give elements of different rows to one inline sequence: {layout}"
    if not case.is_matmul:
        return
    loop = code.main_loop()
    if not row.tensor_core:
        yield "uses no tensor-core instruction in a loop"
    elif row.arch >= 80 and not any(i.name in ASYNC_COPY for i in loop):
        yield "copies nothing asynchronously in its main loop"
    if case.left_in_registers and row.arch == 90 and not left_in_registers(loop):
        yield "does not feed wgmma's left operand from registers"


def _row_of(job: tuple[str | None, int, int]) -> Row:
    """In a worker process, which is sent a position in the list: kernels cannot be pickled."""
    only, index, arch = job
    return compile_row(collect(only)[index], arch)


def compile_all(
    check: bool,
    only: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Every case on every architecture of it, or with `check` the checked ones on three."""
    jobs = [
        (only, index, arch)
        for index, case in enumerate(collect(only))
        for arch in case.architectures
        if not check or (case.checked and arch in CHECKED_ARCHITECTURES)
    ]
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context) as pool:
        for done, row in enumerate(pool.map(_row_of, jobs, chunksize=2), 1):
            rows.append(row)
            if done % 50 == 0 or done == len(jobs):
                progress(f"{done}/{len(jobs)} compiled")
    return rows


def committed_rows(path: Path = RESULTS / "compile_report.json") -> dict[tuple[str, str, int], Row]:
    """The committed table, by kernel, config and architecture; empty before the first report."""
    if not path.exists():
        return {}
    rows = (Row(**raw) for raw in json.loads(path.read_text())["rows"])
    return {row.key: row for row in rows}


def regressions(rows: Iterable[Row], committed: dict[tuple[str, str, int], Row]) -> list[str]:
    """What is worse than the committed table, or missing from it, or wrong in itself."""
    failures = []
    for row in rows:
        name = f"{row.kernel} [{row.config}] sm_{row.arch}"
        before = committed.get(row.key)
        known = before.faults if before is not None else ()
        failures += [f"{name} {fault}" for fault in row.faults if fault not in known]
        if before is None:
            failures.append(f"{name} is not in the committed table: run bench.compile.report")
        elif before.per_element and row.per_element:
            allowed = before.per_element * TOLERANCE
            if row.per_element > allowed:
                failures.append(
                    f"{name} spends {row.per_element} instructions per element, "
                    f"the committed table {before.per_element}"
                )
        if before is not None and before.tensor_core and not row.tensor_core:
            failures.append(f"{name} lost its tensor-core instructions ({before.tensor_core})")
    return failures


def older_table() -> str | None:
    """The name of the table of the Triton that runs this, where that has one of its own."""
    import triton

    name = f"compile_report_{triton.__version__}"
    return name if (RESULTS / f"{name}.json").exists() else None


def write(rows: list[Row], folder: Path = RESULTS, name: str = TABLE) -> None:
    """Write the table as JSON and as Markdown."""
    import triton

    rows = sorted(rows, key=lambda row: (row.kernel, row.arch))
    table: dict[str, Any] = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
    lines = ",\n".join(json.dumps(row) for row in table["rows"])
    text = f'{{"triton": {json.dumps(table["triton"])}, "rows": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text)
    (folder / f"{name}.md").write_text(markdown(rows, table["triton"]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="compile little and compare")
    parser.add_argument("--only", metavar="MODULE", help="a module of bench/compile/cases")
    parser.add_argument("--older", action="store_true", help="write an older Triton's table")
    given = parser.parse_args()
    few = given.check or given.older
    rows = compile_all(few, given.only, partial(print, file=sys.stderr, flush=True))
    if given.older:
        write(rows, name=f"compile_report_{import_module('triton').__version__}")
        faults = []
    elif given.check:
        faults = regressions(rows, committed_rows(RESULTS / f"{older_table() or TABLE}.json"))
    else:
        kernels = {row.kernel for row in rows}
        unchanged = [row for row in committed_rows().values() if row.kernel not in kernels]
        write([*(unchanged if given.only else ()), *rows])
        faults = regressions(rows, {row.key: row for row in rows})
    for fault in faults:
        print(fault)
    print(f"{len(rows)} compilations, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    # Compiling needs the real `triton.jit`, in this process and in the workers it starts.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
