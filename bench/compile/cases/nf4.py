"""Every configuration of the NF4 kernels that `kernels.nf4.tiles` can return."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from bench.compile.cases import (
    ARCHITECTURES,
    BF16_ARCHITECTURES,
    CompileCase,
    architectures_of,
    where_one,
)
from kernels.nf4.dequantize_triton import (
    dequantize_flat_kernel,
    dequantize_planar_kernel,
    dequantize_transposed_kernel,
)
from kernels.nf4.matmul import nf4_matmul_kernel
from kernels.nf4.tiles import MatmulTile, dequantize_tiles, matmul_tiles, transposed_tiles
from kernels.runtime.triton_support import tl

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
DEQUANTIZE_LIMIT = 6.5
MATMUL_LIMITS = {80: 14.0, 86: 14.0, 89: 14.0, 90: 9.0, 100: 14.0, 120: 14.0}


def compile_cases() -> list[CompileCase]:
    transposed = list(_transposed())
    one_row = [where_one(case, "ldo") for case in transposed if case.checked]
    return [*_flat(), *_planar(), *transposed, *one_row, *_matmul()]


def _scale_arguments(nested: bool) -> dict[str, str]:
    """Without double quantisation the stand-ins have the type of the scales."""
    absmax = "*u8" if nested else "*fp32"
    return {"absmax": absmax, "value_map": "*fp32", "nested": "*fp32", "offset": "*fp32"}


def _flat() -> Iterator[CompileCase]:
    pairs = [(tile, tile.steps, "pairs") for tile in dequantize_tiles()]
    tile = dequantize_tiles()[0]
    forms = [*pairs, (tile, 1, "single"), (tile, 1, "transposed")]
    for (tile, steps, way), dtype, nested in product(forms, DTYPES, (True, False)):
        if way == "pairs" and dtype == "fp32":
            continue
        yield CompileCase(
            kernel=dequantize_flat_kernel,
            name="nf4_dequantize_flat",
            config=f"{dtype} {'nested' if nested else 'plain'} {way} steps {steps}",
            signature={
                "packed": "*u8",
                **_scale_arguments(nested),
                "out": f"*{dtype}",
                "numel": "i32",
                "columns": "i32",
                "ldo": "i32",
                "first_chunk": "i32",
                "last_chunk": "i32",
            },
            constexprs={
                "ROWS": tile.rows,
                "STEPS": steps,
                "CHUNK": 64,
                "SCALE_SHIFT": 0,
                "NESTED": nested,
                "WORDS": way == "pairs",
                "TRANSPOSED": way == "transposed",
                "DTYPE": DTYPES[dtype],
                "PTX": True,
            },
            num_warps=tile.warps,
            elements=tile.rows * steps * 64,
            limits=dict.fromkeys(ARCHITECTURES, DEQUANTIZE_LIMIT) if way == "pairs" else {},
            unaligned=frozenset(("columns", "first_chunk")),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and nested and way == "pairs" and steps == 4,
        )


def _planar() -> Iterator[CompileCase]:
    for tile, dtype, nested in product(dequantize_tiles(), DTYPES, (True, False)):
        yield CompileCase(
            kernel=dequantize_planar_kernel,
            name="nf4_dequantize_planar",
            config=f"{dtype} {'nested' if nested else 'plain'} steps {tile.steps}",
            signature=_planar_signature(dtype, nested, "last_block"),
            constexprs={
                "ROWS": tile.rows,
                "STEPS": tile.steps,
                "NESTED_SHIFT": 8,
                "NESTED": nested,
                "WORDS": dtype != "fp32",
                "DTYPE": DTYPES[dtype],
                "PTX": True,
            },
            num_warps=tile.warps,
            elements=tile.rows * tile.steps * 64,
            limits=dict.fromkeys(ARCHITECTURES, DEQUANTIZE_LIMIT) if dtype != "fp32" else {},
            unaligned=frozenset(("blocks", "last_block")),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and nested and tile.steps == 4,
        )


def _transposed() -> Iterator[CompileCase]:
    for tile, dtype, nested in product(transposed_tiles(), DTYPES, (True, False)):
        yield CompileCase(
            kernel=dequantize_transposed_kernel,
            name="nf4_dequantize_transposed",
            config=f"{dtype} {'nested' if nested else 'plain'} rows {tile.rows}",
            signature=_planar_signature(dtype, nested),
            constexprs={
                "ROWS": tile.rows,
                "NESTED_SHIFT": 8,
                "NESTED": nested,
                "DTYPE": DTYPES[dtype],
                "PTX": dtype != "fp32",
            },
            num_warps=tile.warps,
            elements=tile.rows * 64,
            limits=dict.fromkeys(ARCHITECTURES, DEQUANTIZE_LIMIT) if dtype != "fp32" else {},
            unaligned=frozenset(("blocks",)),
            architectures=architectures_of(dtype),
            checked=dtype == "bf16" and nested and tile.rows == 512,
        )


def _planar_signature(dtype: str, nested: bool, *more: str) -> dict[str, str]:
    sizes = ("rows", "blocks", "first_row", "last_row", "first_block", *more, "ldo")
    return {
        "codes": "*i16",
        **_scale_arguments(nested),
        "out": f"*{dtype}",
        **dict.fromkeys(sizes, "i32"),
    }


def _tiles() -> dict[MatmulTile, tuple[int, ...]]:
    """Each fused tile with the architectures that use it."""
    users: dict[MatmulTile, tuple[int, ...]] = {}
    for arch in BF16_ARCHITECTURES:
        for tile in matmul_tiles(arch):
            users[tile] = (*users.get(tile, ()), arch)
    return users


def _matmul() -> Iterator[CompileCase]:
    # An adapter's part is added to before the product is rounded; biases come after both.
    addends = ("", "bias", "accumulate")
    choices = product(_tiles().items(), ("bf16", "fp16"), (True, False), addends, (1, 4))
    for (tile, architectures), dtype, nested, addend, parts in choices:
        if addend == "accumulate" and not nested:
            continue
        config = (
            f"N {tile.block_n} M {tile.block_m} warps {tile.warps} stages {tile.stages} {dtype} "
            f"{'nested' if nested else 'plain'}{f' {addend}' if addend else ''}"
            f"{' split' if parts > 1 else ''}"
        )
        yield CompileCase(
            kernel=nf4_matmul_kernel,
            name="nf4_matmul",
            config=config,
            signature={
                "x": f"*{dtype}",
                "codes": "*i16",
                **_scale_arguments(nested),
                "bias": f"*{dtype}",
                "out": f"*{dtype}",
                "partial": "*fp32",
                "counters": "*i32",
                "m": "i32",
                "rows": "i32",
                "columns": "i32",
                "ldx": "i32",
                "ldo": "i32",
                "parts": "i32",
            },
            constexprs={
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "NESTED_SHIFT": 8,
                "NESTED": nested,
                "HAS_BIAS": addend == "bias",
                "ACCUMULATE": addend == "accumulate",
                "SPLIT": parts > 1,
                "DTYPE": DTYPES[dtype],
                "PTX": True,
            },
            num_warps=tile.warps,
            num_stages=tile.stages,
            elements=tile.block_n * 64,
            limits=MATMUL_LIMITS,
            unaligned=frozenset(("m", "parts")),
            architectures=architectures,
            is_matmul=True,
            left_in_registers=True,
            checked=dtype == "bf16"
            and nested
            and bool(addend)
            and (parts > 1) == (tile.block_m == 16),
        )
