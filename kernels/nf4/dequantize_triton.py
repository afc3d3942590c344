"""Triton kernels that decode NF4 weights, scales included, in one launch.

    absmax[b] = map[code[b]] * nested_absmax[b // 256] + nested_offset     (fp32, two roundings)
    w[i]      = NF4_CODE[nibble[i]] * absmax[i // block_size]              (fp32, one rounding)

Every value is bit for bit that of `kernels.nf4.decode.dequantize`, which is bitsandbytes'. Two
orders of the codes are read: bitsandbytes' (any shape) and the planar one (`kernels.nf4.planar`).
Values are looked up in a table of byte planes that is formed once per block
(`kernels.nf4.decode_ptx`). Two neighbouring threads share a block, each storing every other 16
bytes of it, so that a warp's stores fill whole 32-byte sectors without an exchange through shared
memory. The result may be written transposed: of a planar weight a thread then decodes whole blocks
of two or four neighbouring rows, joins the values of a column in its registers, and a warp stores
128 or 256 bytes of each column, again without an exchange. For a planar weight a range of rows and
of column blocks can be asked for, so that a large weight goes through a small buffer in slabs.

Offsets are 64 bits wide from the program id on: weights of more than 2^31 elements are addressed
correctly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4.decode import dequantize
from kernels.nf4.decode_ptx import (
    INTERPRETED,
    block_scale,
    decode_columns,
    decode_pair,
    decode_plane_words,
    decode_planes,
    decode_words,
)
from kernels.nf4.planar import BLOCK, AnyNF4, PlanarNF4Weight, decoded_tensor, from_planar
from kernels.nf4.tiles import dequantize_tile, transposed_tile
from kernels.nf4.weight import NESTED_BLOCK, NF4Weight
from kernels.runtime.device import architecture, multiprocessors
from kernels.runtime.dispatch import use_triton
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl

_TRITON_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def dequantize_reference(weight: AnyNF4, dtype: torch.dtype) -> Tensor:
    """The plain torch reference for either order of the codes."""
    return dequantize(from_planar(weight) if isinstance(weight, PlanarNF4Weight) else weight, dtype)


@jit
def dequantize_flat_kernel(
    packed, absmax, value_map, nested, offset, out, numel, columns, ldo, first_chunk, last_chunk,
    ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, SCALE_SHIFT: tl.constexpr,
    NESTED: tl.constexpr, WORDS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """bitsandbytes' order: chunks of CHUNK elements, of which ROWS * STEPS per program.

    WORDS reads 8 codes and stores two 16-bit values at once: for whole chunks, and `packed` and
    `out` aligned to 4 bytes. Otherwise every element goes alone.
    """
    start = tl.program_id(0).to(tl.int64) * (ROWS * STEPS) + first_chunk
    shift = tl.load(offset) if NESTED else 0.0
    for step in tl.static_range(STEPS):
        chunk = start + step * ROWS + tl.arange(0, ROWS)[:, None]
        inside = chunk < last_chunk
        block = chunk >> SCALE_SHIFT
        scale = block_scale(absmax, value_map, nested, shift, block, block, inside, NESTED, 8, PTX)
        for part in tl.static_range(CHUNK // 16):
            if WORDS:
                source = packed.to(tl.pointer_type(tl.int32)) + chunk * (CHUNK // 8) + 2 * part
                codes = tl.load(source + tl.arange(0, 2)[None, :], mask=inside, other=0)
                w0, w1, w2, w3 = decode_words(codes, scale, DTYPE)
                # This nesting of joins puts the four words of a thread's codes in order.
                words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 8))
                target = out.to(tl.pointer_type(tl.uint32)) + chunk * (CHUNK // 2) + 8 * part
                tl.store(target + tl.arange(0, 8)[None, :], words, mask=inside)
            else:
                pair = chunk * (CHUNK // 2) + 8 * part + tl.arange(0, 8)[None, :]
                index = chunk * CHUNK + 16 * part + tl.arange(0, 16)[None, :]
                codes = tl.load(packed + pair, mask=inside & (2 * pair < numel), other=0)
                even, odd = decode_pair(codes, scale, DTYPE)
                # Here every element finds its own address, so any shape and either order will do.
                target = index
                if TRANSPOSED:
                    target = (index % columns) * ldo + index // columns
                tl.store(out + target, tl.interleave(even, odd), mask=inside & (index < numel))


@jit
def dequantize_planar_kernel(
    codes, absmax, value_map, nested, offset, out, rows, blocks, first_row, last_row, first_block,
    last_block, ldo,
    ROWS: tl.constexpr, STEPS: tl.constexpr, NESTED_SHIFT: tl.constexpr, NESTED: tl.constexpr,
    WORDS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Planar order: a program decodes ROWS rows of STEPS neighbouring blocks of 64 columns.

    WORDS decodes and stores two 16-bit values at once, and takes an `out` aligned to 4 bytes and an
    even `ldo`.
    """
    # `row` counts in the weight, `local_row` in `out`, which has the rows that are asked for alone.
    local_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row = local_row + first_row
    start = tl.program_id(1).to(tl.int64) * STEPS
    word = tl.arange(0, 8)[None, :]
    single = tl.arange(0, 16)[None, :]
    shift = tl.load(offset) if NESTED else 0.0
    for step in tl.static_range(STEPS):
        block = first_block + start + step
        inside = (row < last_row) & (block < last_block)
        at = block * rows + row
        index = row * blocks + block
        scale = block_scale(
            absmax, value_map, nested, shift, at, index, inside, NESTED, NESTED_SHIFT, PTX
        )
        if WORDS:
            source = codes.to(tl.pointer_type(tl.int32)) + at * 8 + word
            part = tl.load(source, mask=inside, other=0)
            w0, w1, w2, w3 = decode_plane_words(part, scale, DTYPE)
            target = out.to(tl.pointer_type(tl.uint32)) + local_row * (ldo // 2)
            # A plane is 16 columns: 8 words of two 16-bit values.
            target += (start + step) * 32 + word
            tl.store(target, w0, mask=inside)
            tl.store(target + 8, w1, mask=inside)
            tl.store(target + 16, w2, mask=inside)
            tl.store(target + 24, w3, mask=inside)
        else:
            part = tl.load(codes + at * 16 + single, mask=inside, other=0)
            w0, w1, w2, w3 = decode_planes(part, scale, DTYPE, False)
            target = out + local_row * ldo + (start + step) * 64 + single
            tl.store(target, w0, mask=inside)
            tl.store(target + 16, w1, mask=inside)
            tl.store(target + 32, w2, mask=inside)
            tl.store(target + 48, w3, mask=inside)


@jit
def dequantize_transposed_kernel(
    codes, absmax, value_map, nested, offset, out, rows, blocks, first_row, last_row, first_block,
    ldo,
    ROWS: tl.constexpr, NESTED_SHIFT: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Planar order, out (columns, rows): a program decodes ROWS rows of one block of 64 columns.

    PTX decodes two rows at once, to 16 bits. `codes` is aligned to 8 bytes.
    """
    local_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local_block = tl.program_id(1).to(tl.int64)
    row = local_row + first_row
    block = local_block + first_block
    inside = row < last_row
    at = block * rows + row
    index = row * blocks + block
    shift = tl.load(offset) if NESTED else 0.0
    scale = block_scale(
        absmax, value_map, nested, shift, at, index, inside, NESTED, NESTED_SHIFT, PTX
    )
    # A pointer for each nibble position, which goes from column to column: one addition apiece.
    # A launch turns an argument of 1 into a number of Python, which has no `.to`.
    line = tl.cast(ldo, tl.int64)
    at0 = out + local_block * 64 * line + local_row
    at1 = at0 + 16 * line
    at2 = at0 + 32 * line
    at3 = at0 + 48 * line
    # Four planar words at a time, that is four columns of each plane; a thread has whole blocks of
    # neighbouring rows, so the values of a column are adjacent in its registers.
    source = codes.to(tl.pointer_type(tl.int64)) + at * 4
    for four in tl.static_range(4):
        words = tl.load(source + four, mask=inside, other=0)
        for half in tl.static_range(2):
            two = (words >> (32 * half)).to(tl.int32)
            c0, c1, c2, c3, d0, d1, d2, d3 = decode_columns(two, scale, DTYPE, PTX)
            tl.store(at0, c0, mask=inside)
            tl.store(at1, c1, mask=inside)
            tl.store(at2, c2, mask=inside)
            tl.store(at3, c3, mask=inside)
            at0 += ldo
            at1 += ldo
            at2 += ldo
            at3 += ldo
            tl.store(at0, d0, mask=inside)
            tl.store(at1, d1, mask=inside)
            tl.store(at2, d2, mask=inside)
            tl.store(at3, d3, mask=inside)
            at0 += ldo
            at1 += ldo
            at2 += ldo
            at3 += ldo


def nf4_dequantize(
    weight: AnyNF4,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Decode `weight`, in either order of its codes, to a tensor of its shape.

    `dtype` is bf16, fp16 or fp32; it defaults to that of `out`, then to that of the weight that was
    quantised. `out`, if given, is written and returned: contiguous, of the weight's shape. With
    `transposed` a weight (N, K) is returned as a contiguous (K, N). Raises ValueError for another
    dtype and where `out` does not fit.
    """
    if transposed and len(weight.shape) != 2:
        raise ValueError(f"only a 2-D weight can be transposed, got shape {weight.shape}")
    shape = weight.shape[::-1] if transposed else weight.shape
    out = decoded_tensor(shape, weight, dtype, out)
    if not use_triton(out):
        plain = dequantize_reference(weight, out.dtype)
        return out.copy_(plain.T if transposed else plain)
    if isinstance(weight, PlanarNF4Weight):
        dequantize_planar(weight, out, transposed=transposed)
    else:
        dequantize_flat(weight, out, transposed=transposed)
    return out


def dequantize_planar(
    weight: PlanarNF4Weight,
    out: Tensor,
    rows: range | None = None,
    blocks: range | None = None,
    *,
    transposed: bool = False,
) -> None:
    """Launch the planar kernel for `rows` and `blocks` of 64 columns of the weight, by default all.

    `out` is (rows, 64 blocks), or the reverse with `transposed`, its last dimension contiguous.
    """
    total_rows, columns = weight.shape
    rows = range(total_rows) if rows is None else rows
    blocks = range(columns // BLOCK) if blocks is None else blocks
    given = (weight.codes, weight.absmax, *nested_arguments(weight), out, total_rows)
    ranges = (columns // BLOCK, rows.start, rows.stop, blocks.start)
    options = {
        "NESTED_SHIFT": nested_shift(weight),
        "NESTED": weight.nested_absmax is not None,
        "DTYPE": triton_dtype(out.dtype),
    }
    if transposed:
        if weight.codes.data_ptr() % 8 != 0:
            raise ValueError("the codes of a transposed NF4 weight must be aligned to 8 bytes")
        tile = transposed_tile(multiprocessors(out.device), len(rows) * len(blocks))
        with on_device(out):
            launch(dequantize_transposed_kernel, (cdiv(len(rows), tile.rows), len(blocks)))(
                *given,
                *ranges,
                out.stride(0),
                ROWS=tile.rows,
                PTX=_by_hardware(out),
                num_warps=tile.warps,
                **options,
            )
        return
    tile = dequantize_tile(multiprocessors(out.device), len(rows) * len(blocks))
    grid = (cdiv(len(rows), tile.rows), cdiv(len(blocks), tile.steps))
    with on_device(out):
        launch(dequantize_planar_kernel, grid)(
            *given,
            *ranges,
            blocks.stop,
            out.stride(0),
            ROWS=tile.rows,
            STEPS=tile.steps,
            WORDS=_in_words(out) and out.stride(0) % 2 == 0,
            PTX=not INTERPRETED,
            num_warps=tile.warps,
            **options,
        )


def dequantize_flat(weight: NF4Weight, out: Tensor, *, transposed: bool = False) -> None:
    """Launch the flat kernel: whole chunks two values at a time, what is left one at a time."""
    numel = weight.numel()
    chunk = min(weight.block_size, BLOCK)
    whole = numel // chunk
    paired = _in_words(out) and not transposed and weight.packed.data_ptr() % 4 == 0
    parts: list[tuple[int, int, bool]] = [(0, whole, True)] if paired else []
    rest = whole if paired else 0
    if rest * chunk < numel:
        parts.append((rest, cdiv(numel, chunk), False))
    for first, last, words in parts:
        if first < last:
            _launch_flat(weight, out, first, last, words=words, transposed=transposed)


def _launch_flat(
    weight: NF4Weight, out: Tensor, first: int, last: int, *, words: bool, transposed: bool
) -> None:
    chunk = min(weight.block_size, BLOCK)
    tile = dequantize_tile(multiprocessors(out.device), last - first)
    steps = tile.steps if words else 1
    with on_device(out):
        launch(dequantize_flat_kernel, (cdiv(last - first, tile.rows * steps),))(
            weight.packed, weight.absmax, *nested_arguments(weight), out, weight.numel(),
            weight.shape[-1] if weight.shape else 1, weight.shape[0] if weight.shape else 1, first,
            last,
            ROWS=tile.rows, STEPS=steps, CHUNK=chunk,
            SCALE_SHIFT=(weight.block_size // chunk).bit_length() - 1,
            NESTED=weight.nested_absmax is not None, WORDS=words, TRANSPOSED=transposed,
            DTYPE=triton_dtype(out.dtype), PTX=not INTERPRETED, num_warps=tile.warps,
        )  # fmt: skip


def _in_words(out: Tensor) -> bool:
    """Whether values can be decoded two at a time and stored as one: by hardware, and aligned."""
    return out.data_ptr() % 4 == 0 and _by_hardware(out)


def _by_hardware(out: Tensor) -> bool:
    """Whether the inline PTX decodes to the dtype of `out`: 16-bit, and rounded in hardware."""
    if INTERPRETED or out.dtype == torch.float32:
        return False
    return out.dtype == torch.float16 or architecture(out.device) >= 80


def nested_arguments(weight: AnyNF4) -> tuple[Tensor, Tensor, Tensor]:
    """Value map, nested scales, offset; without double quantisation stand-ins, never read."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax, weight.absmax, weight.absmax
    return dynamic_map(True, weight.device), weight.nested_absmax, weight.nested_offset


def nested_shift(weight: PlanarNF4Weight) -> int:
    """By how many bits the index of a block of 64 is shifted to that of its nested scale."""
    return (NESTED_BLOCK * weight.block_size // BLOCK).bit_length() - 1


def triton_dtype(dtype: torch.dtype) -> object:
    """Triton's name of a torch dtype that NF4 decodes to."""
    return getattr(tl, _TRITON_DTYPES[dtype])
