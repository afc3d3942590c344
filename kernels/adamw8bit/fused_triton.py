"""Triton kernels of the 8-bit AdamW step over all parameters.

Maths, layout and rounding are those of `kernels.adamw8bit`; this file runs them where the
parameters are. A step is four launches, however many parameters there are:

1. `grad_norm_kernel` sums the squares of all gradients in float64, a partial sum per program;
2. `prepare_kernel`, one program, makes of them the norm, the clipping coefficient and a flag that
   all is finite; counts the step, or the skipped step; and works out each parameter's factors;
3. `adamw_kernel`, once over the 8-bit rows and once over the fp32 rows, moves the parameters and
   their moments, or nothing if the flag is down.

Parameters and gradients stay where torch put them: a table of their addresses and sizes is on the
device. Copying them into flat buffers would cost as much traffic as the step itself. The table is
uploaded again only when an address changes. A program owns a `work` item, up to four rows of 256
elements of one parameter, so that all it reads from tables are scalars.

Codes come from two lookups (`kernels.adamw8bit.dynamic_map.magnitude_tables`) instead of a
binary search.
"""

from __future__ import annotations

from kernels.adamw8bit import LARGEST_NORM
from kernels.adamw8bit.dynamic_map import FIRST_CELL
from kernels.runtime.triton_support import jit, tl

COLUMNS = 8
"""Columns of the segment table: address of parameter, gradient and master, elements, first row of
its moments, kind, group, and the number of the parameter, by which its steps are counted."""

FACTORS = 8
"""Columns of the factors: decay, step size, 1 / denominator scale, eps, b1, b2, 1 - b1, 1 - b2."""

WORK_ROWS = 4
NUM_WARPS = 4
NORM_PROGRAMS = 1024
PREPARE_BLOCK = 256

_TINY = tl.constexpr(2.0**-126)
_FIRST_CELL = tl.constexpr(FIRST_CELL)
_STEP_BITS = tl.constexpr(31)
_LARGEST_NORM = tl.constexpr(LARGEST_NORM)


@jit
def _pointer(table, column: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """The pointer in a column of a segment's entry."""
    # An address from a table says nothing of its alignment, without which loads stay narrow.
    pointer = tl.load(table + column).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _claim(segments, work, item, KIND: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr):
    """A work item: segment, its entry, first row, and the element numbers with those that exist.

    None exist for a parameter of another kind or without a gradient.
    """
    segment = tl.load(work + item * 2).to(tl.int64)
    row = tl.load(work + item * 2 + 1).to(tl.int64)
    entry = segments + segment * 8
    numel = tl.load(entry + 3)
    wanted = (tl.load(entry + 5) == KIND) & (tl.load(entry + 1) != 0)
    # No elements rather than a branch: the rest of the kernel is the same for every item.
    numel = tl.where(wanted, numel, 0)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    index = row * 256 + tl.arange(0, ROWS * 256)
    return segment, entry, row, index, index < numel


@jit
def grad_norm_kernel(
    segments, work, partials, items,
    KIND: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Partial sums of squares of the gradients of one kind, one per program."""
    program = tl.program_id(0).to(tl.int64)
    # float64, in which squares of finite fp32 gradients cannot overflow.
    total = tl.zeros((ROWS * 256,), dtype=tl.float64)
    for item in range(program, items, tl.num_programs(0).to(tl.int64)):
        _, entry, _, index, mask = _claim(segments, work, item, KIND, ALIGNED, ROWS)
        grad = _pointer(entry, 1, GRAD, ALIGNED) + index
        value = tl.load(grad, mask=mask, other=0.0).to(tl.float64)
        total += value * value
    tl.store(partials + program, tl.sum(total, axis=0))


@jit
def _power(base, exponent):
    """base^exponent in float64, by squaring."""
    result = base * 0.0 + 1.0
    for _ in tl.static_range(_STEP_BITS):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@jit
def prepare_kernel(
    segments, groups, partials, grad_scale, steps, skipped, factors, outcome, segment_count,
    partial_count, max_norm,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: outcome = (norm, gradient factor, finite), step counts, and the factors."""
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, partial_count, BLOCK):
        at = start + lane
        squares += tl.load(partials + at, mask=at < partial_count, other=0.0)
    scale = tl.load(grad_scale)
    norm = tl.sqrt(tl.sum(squares, axis=0)) * tl.abs(scale)
    # NaN fails all comparisons. Moments in fp32 do not hold the square of a longer gradient.
    finite = (norm >= 0.0) & (norm < float("inf"))
    made = tl.where(finite & (tl.minimum(norm, max_norm) < _LARGEST_NORM), 1, 0)
    # 1 where the norm is small enough, and never a division by zero.
    clip = max_norm / tl.maximum(norm, max_norm)
    tl.store(outcome, norm.to(tl.float32))
    tl.store(outcome + 1, (scale * clip).to(tl.float32))
    tl.store(outcome + 2, made.to(tl.float32))
    tl.store(skipped, tl.load(skipped) + 1 - made)
    for start in range(0, segment_count, BLOCK):
        at = (start + lane).to(tl.int64)
        inside = at < segment_count
        active = tl.load(segments + at * 8 + 1, mask=inside, other=0) != 0
        number = tl.load(segments + at * 8 + 7, mask=inside, other=0)
        step = tl.load(steps + number, mask=inside, other=0) + tl.where(active, made, 0)
        tl.store(steps + number, step, mask=inside)
        group = groups + tl.load(segments + at * 8 + 6, mask=inside, other=0) * 5
        lr = tl.load(group, mask=inside, other=0.0)
        beta1 = tl.load(group + 1, mask=inside, other=0.0)
        beta2 = tl.load(group + 2, mask=inside, other=0.0)
        eps = tl.load(group + 3, mask=inside, other=0.0)
        decay = 1.0 - lr * tl.load(group + 4, mask=inside, other=0.0)
        # Nothing reads the factors of a parameter that has made no step.
        counted = tl.maximum(step, 1)
        # In float64: 1 - beta^t cancels in fp32 while t is small.
        step_size = -lr / (1.0 - _power(beta1, counted))
        inverse = 1.0 / tl.sqrt(1.0 - _power(beta2, counted))
        out = factors + at * 8
        tl.store(out, decay.to(tl.float32), mask=inside)
        tl.store(out + 1, step_size.to(tl.float32), mask=inside)
        tl.store(out + 2, inverse.to(tl.float32), mask=inside)
        tl.store(out + 3, eps.to(tl.float32), mask=inside)
        tl.store(out + 4, beta1.to(tl.float32), mask=inside)
        tl.store(out + 5, beta2.to(tl.float32), mask=inside)
        tl.store(out + 6, (1.0 - beta1).to(tl.float32), mask=inside)
        tl.store(out + 7, (1.0 - beta2).to(tl.float32), mask=inside)


@jit
def _encode_nearest(scaled, cells, thresholds, SIGNED: tl.constexpr):
    # The high half of a float's bits grows with it and numbers a cell with one threshold at most.
    size = tl.abs(scaled)
    cell = tl.maximum(size.to(tl.int32, bitcast=True) >> 16, _FIRST_CELL) - _FIRST_CELL
    code = tl.load(cells + cell).to(tl.int32)
    threshold = tl.load(thresholds + code)
    if not SIGNED:
        return code + (size > threshold).to(tl.int32)
    negative = scaled < 0.0
    # Ties go down, which for a negative value is away from zero; and it never becomes zero.
    beyond = (size > threshold) | (negative & (size == threshold))
    code += beyond.to(tl.int32)
    return tl.where(negative, 127 - tl.minimum(tl.maximum(code, 1), 127), 127 + code)


@jit
def _encode(x, cells, thresholds, SIGNED: tl.constexpr, NEAREST: tl.constexpr, ROWS: tl.constexpr):
    """Codes of ROWS rows of 256 and their absmax. Without NEAREST, `cells` is the grid's table."""
    rows = tl.reshape(x, (ROWS, 256))
    absmax = tl.max(tl.abs(rows), axis=1)
    # Correctly rounded, so that the codes are those of the reference.
    scaled = rows * tl.div_rn(1.0, tl.maximum(absmax, _TINY))[:, None]
    if NEAREST:
        code = _encode_nearest(scaled, cells, thresholds, SIGNED)
    else:
        # Without the shift a block of zeros takes code 0.
        shift = tl.where(absmax == 0.0, 0.0, 1.0)[:, None]
        code = tl.load(cells + ((scaled + shift) * 32767.5 + 0.5).to(tl.int32)).to(tl.int32)
    return tl.reshape(code.to(tl.uint8), (ROWS * 256,)), absmax


@jit
def _random_bits(seed, index, number, step):
    # A function of element, parameter and step: a resumed run draws what it would have drawn.
    zero = (index * 0).to(tl.uint32)
    word2, word3 = zero + number.to(tl.uint32), zero + step.to(tl.uint32)
    random, _, _, _ = tl.philox(seed, index.to(tl.uint32), zero, word2, word3)
    return random.to(tl.uint32) & 0xFFFF


@jit
def _to_bf16(value, raised_by):
    """Bits of fp32 plus `raised_by`, cut to bf16. A cast cuts too, in Triton's interpreter."""
    bits = value.to(tl.uint32, bitcast=True) + raised_by
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@jit
def _expand(per_row, ROWS: tl.constexpr):
    """(ROWS,) to one value per element, (ROWS * 256,)."""
    return tl.reshape(tl.broadcast_to(per_row[:, None], (ROWS, 256)), (ROWS * 256,))


@jit
def adamw_kernel(
    segments, work, factors, outcome, steps, m_rows, v_rows, m_absmax, v_absmax, m_map, v_map,
    m_cells, v_cells, m_thresholds, v_thresholds, seed,
    KIND: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, MASTER: tl.constexpr,
    QUANTIZED: tl.constexpr, NEAREST: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A work item: its parameters and moments move by one step, unless `outcome` says no."""
    item = tl.program_id(0).to(tl.int64)
    if tl.load(outcome + 2) == 0.0:
        return
    segment, entry, row, index, mask = _claim(segments, work, item, KIND, ALIGNED, ROWS)
    grad = tl.load(_pointer(entry, 1, GRAD, ALIGNED) + index, mask=mask, other=0.0)
    g = grad.to(tl.float32) * tl.load(outcome + 1)
    moment_row = tl.load(entry + 4) + row
    at = moment_row * 256 + tl.arange(0, ROWS * 256)
    scale_at = moment_row + tl.arange(0, ROWS)
    scale_mask = (row + tl.arange(0, ROWS)) * 256 < tl.load(entry + 3)
    if QUANTIZED:
        # 127 is the code of zero in the signed map, 0 in the unsigned one.
        m_code = tl.load(m_rows + at, mask=mask, other=127).to(tl.int32)
        v_code = tl.load(v_rows + at, mask=mask, other=0).to(tl.int32)
        m_scale = tl.load(m_absmax + scale_at, mask=scale_mask, other=0.0)
        v_scale = tl.load(v_absmax + scale_at, mask=scale_mask, other=0.0)
        m = tl.load(m_map + m_code) * _expand(m_scale, ROWS)
        v = tl.load(v_map + v_code) * _expand(v_scale, ROWS)
    else:
        m = tl.load(m_rows + at, mask=mask, other=0.0)
        v = tl.load(v_rows + at, mask=mask, other=0.0)

    # The parameter moves by the new moments as they are here, before they are rounded to 8 bits.
    factor = factors + segment * 8
    m = m * tl.load(factor + 4) + g * tl.load(factor + 6)
    v = v * tl.load(factor + 5) + g * g * tl.load(factor + 7)
    denominator = tl.sqrt(v) * tl.load(factor + 2) + tl.load(factor + 3)
    move = tl.load(factor + 1) * m / denominator

    param = _pointer(entry, 0, PARAM, ALIGNED) + index
    decay = tl.load(factor)
    if MASTER:
        master = _pointer(entry, 2, tl.float32, ALIGNED) + index
        p = tl.load(master, mask=mask, other=0.0) * decay + move
        tl.store(master, p, mask=mask)
    else:
        p = tl.load(param, mask=mask, other=0.0).to(tl.float32) * decay + move
    if STOCHASTIC:
        number = tl.load(entry + 7)
        random = _random_bits(seed, index, number, tl.load(steps + number))
        tl.store(param, _to_bf16(p, random), mask=mask)
    elif PARAM == tl.bfloat16:
        # To nearest even by hand: the interpreter's cast to bf16 cuts bits off.
        to_nearest = 0x7FFF + ((p.to(tl.uint32, bitcast=True) >> 16) & 1)
        tl.store(param, _to_bf16(p, to_nearest), mask=mask)
    else:
        tl.store(param, p.to(PARAM), mask=mask)

    if QUANTIZED:
        # A row's scale belongs to all its elements, so it has a mask of its own.
        written = scale_mask & (tl.load(entry + 1) != 0) & (tl.load(entry + 5) == KIND)
        m_code, m_scale = _encode(m, m_cells, m_thresholds, True, NEAREST, ROWS)
        tl.store(m_rows + at, m_code, mask=mask)
        tl.store(m_absmax + scale_at, m_scale, mask=written)
        v_code, v_scale = _encode(v, v_cells, v_thresholds, False, NEAREST, ROWS)
        tl.store(v_rows + at, v_code, mask=mask)
        tl.store(v_absmax + scale_at, v_scale, mask=written)
    else:
        tl.store(m_rows + at, m, mask=mask)
        tl.store(v_rows + at, v, mask=mask)
