"""Choose between the two products of NF4 experts by measurement.

With few rows per expert the experts are decoded on the way (`grouped_matmul_triton`), which reads
4 bits an element; with many it may pay to decode them all at once (`grouped_library`). From
LIBRARY_ROWS on both are timed on the operands that have come, once for each kind of product, and
the faster one is remembered for the process. The choice is a rule, not a measurement,

    in torch's deterministic mode   the library, from LIBRARY_ROWS on, so that a run repeats
    in a simulated step             the library, which takes more memory: a plan covers both
    while launches are recorded     on the way, unless the kind was timed before

and where the library's product does not suit (`grouped_library.suits`) there is no choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.moe.grouped_library import ExpertProduct, library_matmul, suits
from kernels.runtime.device import recording, seconds
from kernels.runtime.simulation import simulation

LIBRARY_ROWS = 256
"""Mean rows per expert below which decoding on the way is taken without a trial."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProductKind:
    """What a trial stands for. `rows` per expert are rounded down to a power of two."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    transpose: bool
    gathered: bool
    rows: int


def kind_of(product: ExpertProduct) -> ProductKind:
    """The kind whose trial answers for `product`."""
    x = product.rows.matrix
    rows = 1 << (product.rows_per_expert.bit_length() - 1)
    shape, gathered = tuple(product.weight.shape), product.rows.rows is not None
    return ProductKind(x.device, x.dtype, shape, product.transpose, gathered, rows)


_library_wins: dict[ProductKind, bool] = {}


def multiply_nf4(product: ExpertProduct, fused: Callable[[], None]) -> None:
    """Write `product.out` by the library, or by `fused`, which does the same product."""
    if library_is_taken(product, fused):
        library_matmul(product)
    else:
        fused()


def library_is_taken(product: ExpertProduct, fused: Callable[[], None]) -> bool:
    """Whether the library does this product; `fused` is what would do it otherwise.

    A trial runs both, and leaves in `product.out` what the next product overwrites.
    """
    if product.rows_per_expert < LIBRARY_ROWS or not suits(product):
        return False
    if simulation() is not None or torch.are_deterministic_algorithms_enabled():
        return True
    kind = kind_of(product)
    if kind not in _library_wins:
        if product.accumulate or recording(kind.device):
            return False  # a trial would add more than once, or be recorded
        _library_wins[kind] = timed(kind, fused, lambda: library_matmul(product))
    return _library_wins[kind]


def timed(kind: ProductKind, fused: Callable[[], None], library: Callable[[], None]) -> bool:
    """Whether the library was faster on the device of `kind`. The host waits for both."""
    on_the_way, at_once = seconds(fused, kind.device), seconds(library, kind.device)
    _log.info(
        "NF4 experts %s with %d or more rows each: %.0f us decoded on the way, %.0f us at once",
        kind.shape, kind.rows, 1e6 * on_the_way, 1e6 * at_once,
    )  # fmt: skip
    return at_once < on_the_way
