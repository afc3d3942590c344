"""NF4: four-bit weights in blocks whose scales are quantised again.

Maths. The flat, row-major weight is cut into blocks of `block_size`. A block stores
`absmax = max|w|` and, per element, the index of the entry of `NF4_CODE` nearest to
`w * (1 / absmax)` (Dettmers et al., "QLoRA", 2023, appendix E). Two indices share a byte, the even
element in the high nibble. Double quantisation stores the scales in 8 bits: `absmax - mean(absmax)`
in blocks of 256 in the signed dynamic map (`kernels.adamw8bit.dynamic_map`), so that

    absmax[b] = map[code[b]] * nested_absmax[b // 256] + nested_offset     (fp32)
    w[i]      = NF4_CODE[nibble[i]] * absmax[i // block_size]              (fp32, then one rounding)

Codes, scales and decoded values are bit for bit those of bitsandbytes 0.50 on a CPU, in its byte
order. The mean is torch's, whose last bit may depend on the number of threads, as it does there.

Both directions work in slabs: on a CPU, beside its result, `quantize` holds about 3 MB and
`dequantize` under 1 MB.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import dynamic_map, quantize_blocks
from kernels.nf4.quantize_triton import quantize_whole_blocks
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch
from kernels.runtime.simulation import equal_parts, once_per_shape

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The sixteen values of NF4, fp32, ascending."""

NESTED_BLOCK = 256
"""Scales per block of the second quantisation."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_SCALE = 1e-38
_CELLS = 32
_QUANTIZE_SLAB = 1 << 17
# torch gives an elementwise op of more than 32,768 elements to several threads. A decode that lasts
# some hundred microseconds gains nothing from that and waits for every thread to be scheduled, so
# on a CPU it is cut into parts that stay on one core and in its cache.
_GRAIN = 1 << 15
_CPU_SLAB = 2 * _GRAIN
_CUDA_SLAB = 1 << 22
_SCALES_AT_ONCE = 1 << 15


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight in NF4.

    `packed` is uint8 (ceil(n / 2),). With double quantisation, `absmax` is uint8 (blocks,),
    `nested_absmax` fp32 (ceil(blocks / 256),) and `nested_offset` fp32 (); without it, `absmax` is
    fp32 and the other two are None. `shape` and `dtype` are those of the weight that was quantised.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the four tensors."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.nbytes for part in parts if part is not None)

    def numel(self) -> int:
        return math.prod(self.shape)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NF4Weight:
        """The same weight on `device`."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        return replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            absmax=self.absmax.to(device, non_blocking=non_blocking),
            nested_absmax=moved(self.nested_absmax),
            nested_offset=moved(self.nested_offset),
        )


def quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise `w` (any shape, fp32, bf16 or fp16, any device) to NF4.

    Raises ValueError for an empty tensor, another dtype, a block size outside `BLOCK_SIZES`, and
    for a weight with NaN or infinity, whose scales would spoil their neighbours through the mean.
    """
    if w.dtype not in _DTYPES:
        raise ValueError(f"NF4 holds float32, bfloat16 or float16 weights, got {w.dtype}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    if w.numel() == 0:
        raise ValueError(f"cannot quantise an empty tensor of shape {tuple(w.shape)}")
    packed, absmax = _quantize_flat(w.detach().reshape(-1), block_size)
    weight = NF4Weight(packed, absmax, None, None, tuple(w.shape), block_size, w.dtype)
    if not double_quant:
        return weight
    offset = absmax.mean()
    codes, nested_absmax = _quantize_scales(absmax.sub_(offset))
    return replace(weight, absmax=codes, nested_absmax=nested_absmax, nested_offset=offset)


def dequantize(
    weight: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Decode `weight` to a tensor of its shape.

    `dtype` is fp32, bf16 or fp16; it defaults to that of `out`, then to that of the weight that was
    quantised. `out`, if given, must be contiguous and hold as many elements as the weight; it is
    written, and returned in the weight's shape. Raises ValueError where `out` does not fit.
    """
    rows = weight.shape[0] if weight.shape else 1
    return dequantize_rows(weight, 0, rows, dtype=dtype, out=out)


def dequantize_rows(
    weight: NF4Weight,
    start: int,
    stop: int,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode rows `start:stop` of the weight's first dimension; arguments as in `dequantize`.

    Rows that do not begin on a block boundary cost one block of extra work.
    """
    rows = weight.shape[0] if weight.shape else 1
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start}:{stop} lie outside a weight of {rows} rows")
    per_row = weight.numel() // rows
    shape = (stop - start, *weight.shape[1:]) if weight.shape else ()
    count = (stop - start) * per_row
    if dtype is None:
        dtype = weight.dtype if out is None else out.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"NF4 decodes to float32, bfloat16 or float16, got {dtype}")
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weight.device)
    elif out.numel() != count or out.dtype != dtype or out.device != weight.device:
        raise ValueError(
            f"out holds {out.numel()} {out.dtype} values on {out.device}, "
            f"expected {count} of {dtype} on {weight.device}"
        )
    elif not out.is_contiguous():
        raise ValueError("out must be contiguous")
    with torch.no_grad():
        _decode(weight, start * per_row, out.view(-1))
    return out.view(shape)


def _quantize_flat(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (packed) and fp32 scales of a flat tensor."""
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    if use_triton(flat):
        quantize_whole_blocks(flat, _thresholds(flat.device), block_size, packed, absmax)
        _refuse_nonfinite(absmax[: n // block_size])
    else:
        _quantize_whole_blocks(flat, block_size, packed, absmax)
    whole = n - n % block_size
    if whole < n:
        # bitsandbytes multiplies a whole block by its inverse scale but divides a short last one.
        rest = flat[whole:].float()
        scale = rest.abs().amax()
        _refuse_nonfinite(scale)
        absmax[-1] = scale.clamp_(min=_SMALLEST_SCALE)
        padded = torch.nn.functional.pad(rest / scale, (0, rest.numel() % 2))
        _pack(_nearest_code(padded), packed[whole // 2 :])
    return packed, absmax


@once_per_shape(lambda flat, block_size, *_: (flat.numel(), flat.dtype, block_size))
def _quantize_whole_blocks(flat: Tensor, block_size: int, packed: Tensor, absmax: Tensor) -> None:
    """Write codes and scales of all but a short last block, a slab at a time."""
    whole = flat.numel() - flat.numel() % block_size
    for begin in equal_parts(range(0, whole, _QUANTIZE_SLAB)):
        end = min(begin + _QUANTIZE_SLAB, whole)
        blocks = flat[begin:end].view(-1, block_size)
        blocks = blocks.float() if flat.dtype != torch.float32 else blocks
        scales = blocks.abs().amax(dim=1)
        _refuse_nonfinite(scales)
        absmax[begin // block_size : end // block_size] = scales
        inverse = scales.clamp_(min=_SMALLEST_SCALE).reciprocal_()
        _pack(_nearest_code((blocks * inverse[:, None]).view(-1)), packed[begin // 2 : end // 2])


def _refuse_nonfinite(scales: Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("cannot quantise a weight that holds NaN or infinity")


@functools.cache
def _thresholds(device: torch.device) -> Tensor:
    """The 15 midpoints between neighbouring values, fp32."""
    return ((NF4_CODE[1:] + NF4_CODE[:-1]) / 2).to(device)


@functools.cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of 32 even cells over [-1, 1]: the code at its left edge and the next threshold.

    NF4's thresholds lie more than a cell apart and none lies on an edge, so a cell holds at most
    one and a single comparison completes the search.
    """
    thresholds = _thresholds(torch.device("cpu"))
    edges = torch.arange(_CELLS + 1, dtype=torch.float32, device="cpu") * (2.0 / _CELLS) - 1.0
    code = torch.bucketize(edges, thresholds, out_int32=True)
    beyond = torch.tensor([2.0], dtype=torch.float32, device="cpu")
    return code.to(device), torch.cat([thresholds, beyond])[code.long()].to(device)


def _nearest_code(scaled: Tensor) -> Tensor:
    """Index (int32) of the NF4 value nearest to `scaled`, fp32 (n,) in [-1, 1]; ties go down."""
    left, threshold = _cells(scaled.device)
    cell = ((scaled + 1.0) * (_CELLS / 2)).to(torch.int32)
    return left.index_select(0, cell).add_(scaled > threshold.index_select(0, cell))


def _pack(codes: Tensor, out: Tensor) -> None:
    pairs = codes.to(torch.uint8).view(-1, 2)
    torch.add(pairs[:, 1], pairs[:, 0], alpha=16, out=out)


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise centred fp32 scales (n,): codes uint8 (n,) and absmax fp32 (ceil(n / 256),)."""
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    codes, absmax = quantize_blocks(blocks, signed=True, rounding="grid")
    return codes.view(-1)[:n].clone(), absmax


@functools.cache
def _pair_table(device: torch.device) -> Tensor:
    """The two fp32 values of each packed byte, as one int64 word: one lookup moves both."""
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([NF4_CODE[byte >> 4], NF4_CODE[byte & 15]], dim=1)
    return pairs.view(torch.int64).view(-1).to(device)


def _decoding(weight: NF4Weight, begin: int, out: Tensor) -> tuple[object, ...]:
    """What decides how much memory decoding takes."""
    skew, nested = begin % weight.block_size, weight.nested_absmax is not None
    return out.numel(), out.dtype, weight.block_size, skew, nested


@once_per_shape(_decoding)
def _decode(weight: NF4Weight, begin: int, out: Tensor) -> None:
    """Decode the flat elements from `begin` on into the flat `out`."""
    block_size = weight.block_size
    skew = begin % block_size
    if skew:
        head = min(block_size - skew, out.numel())
        block = torch.empty(skew + head, dtype=torch.float32, device=out.device)
        _decode_blocks(weight, begin - skew, block)
        out[:head].copy_(block[skew:])
        begin, out = begin + head, out[head:]
    span = _SCALES_AT_ONCE * block_size
    for at in equal_parts(range(0, out.numel(), span)):
        _decode_blocks(weight, begin + at, out[at : at + span])


def _decode_blocks(weight: NF4Weight, begin: int, out: Tensor) -> None:
    """Decode into the flat `out` from `begin`, which lies on a block boundary."""
    n, block_size = out.numel(), weight.block_size
    if out.dtype == torch.float32 and out.data_ptr() % 8 == 0:
        scales = _decode_scales(weight, begin // block_size, -(-(begin + n) // block_size))
        _look_up(weight, begin, scales, out)
        return
    slab = _GRAIN if out.is_cpu else _CUDA_SLAB
    for at in equal_parts(range(0, n, slab)):
        target = out[at : at + slab]
        exact = scratch("nf4 slab", (target.numel(),), torch.float32, out.device)
        _decode_blocks(weight, begin + at, exact)
        target.copy_(exact)


def _look_up(weight: NF4Weight, begin: int, scales: Tensor, out: Tensor) -> None:
    """Values times `scales`, two at a time, into `out`: fp32, aligned to 8 bytes."""
    n, block_size = out.numel(), weight.block_size
    even, whole = n - n % 2, n - n % block_size
    slab = _CPU_SLAB if out.is_cpu else _CUDA_SLAB
    rows, half = (_GRAIN if out.is_cpu else slab) // block_size, slab // 2
    table = _pair_table(weight.device)
    pairs = weight.packed[begin // 2 : (begin + n + 1) // 2]
    if even < n:
        last = table.index_select(0, pairs[-1:].to(torch.int32))
        out[even:] = last.view(torch.float32)[:1]
    blocks = torch.split(out[:whole].view(-1, block_size), rows)
    factors = torch.split(scales[: whole // block_size, None], rows)
    products = iter(zip(blocks, factors, strict=True))
    index = scratch("nf4 index", (half,), torch.int32, weight.device)
    sources = torch.split(pairs[: even // 2], half)
    targets = torch.split(out[:even].view(torch.int64), half)
    for source, target in equal_parts(zip(sources, targets, strict=True)):
        chosen = index[: len(source)].copy_(source)
        torch.index_select(table, 0, chosen, out=target)
        for block, factor in itertools.islice(products, slab // (rows * block_size)):
            block.mul_(factor)
    if whole < n:
        out[whole:].mul_(scales[-1])


def _decode_scales(weight: NF4Weight, first: int, last: int) -> Tensor:
    """fp32 scales of the blocks `first:last`."""
    if weight.nested_absmax is None or weight.nested_offset is None:
        return weight.absmax[first:last]
    aligned = first - first % NESTED_BLOCK
    codes = weight.absmax[aligned:last].to(torch.int32)
    scales = dynamic_map(True, weight.device).index_select(0, codes)
    nested = weight.nested_absmax[aligned // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
    whole = scales.numel() - scales.numel() % NESTED_BLOCK
    scales[:whole].view(-1, NESTED_BLOCK).mul_(nested[: whole // NESTED_BLOCK, None])
    if whole < scales.numel():
        scales[whole:].mul_(nested[-1])
    return scales.add_(weight.nested_offset)[first - aligned :]
