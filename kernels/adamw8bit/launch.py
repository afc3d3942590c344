"""The flat AdamW step's table of addresses, and its launches.

Nothing here waits for the device or reads from it. See `kernels.adamw8bit.fused_triton` for the
kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.adamw8bit.dynamic_map import Rounding, dynamic_map, grid_table, magnitude_tables
from kernels.adamw8bit.fused_triton import (
    COLUMNS,
    FACTORS,
    NORM_PROGRAMS,
    NUM_WARPS,
    PREPARE_BLOCK,
    WORK_ROWS,
    adamw_kernel,
    grad_norm_kernel,
    prepare_kernel,
)
from kernels.runtime.device import upload
from kernels.runtime.triton_support import launch, on_device, tl

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class FlatMoments:
    """All moments: 8-bit rows with their absmax, fp32 rows, and counts of steps per parameter."""

    m_codes: Tensor
    v_codes: Tensor
    m_absmax: Tensor
    v_absmax: Tensor
    m_exact: Tensor
    v_exact: Tensor
    steps: Tensor
    skipped: Tensor


@dataclass(frozen=True)
class SegmentKind:
    """What a kernel must know when it is compiled: the dtypes of a parameter and its gradient."""

    param: torch.dtype
    grad: torch.dtype
    master: bool


def _work(segments: Sequence[tuple[int, int]]) -> np.ndarray:
    """The work items (entry, first row) of `segments` (entry, rows), int32 (items, 2)."""
    parts = [np.empty((0, 2), dtype=np.int32)]
    for entry, count in segments:
        first = np.arange(0, count, WORK_ROWS, dtype=np.int32)
        parts.append(np.stack((np.full_like(first, entry), first), axis=1))
    return np.concatenate(parts)


class SegmentTable:
    """Where parameters, gradients and masters are, on the device (`fused_triton`).

    `rows` gives for each parameter whether its moments are 8-bit, their first row and how many,
    `groups` its group; all are of every parameter, of which a table has some `members` or all.
    Gradients may move between steps: `refresh` looks.
    """

    def __init__(
        self,
        rows: Sequence[tuple[bool, int, int]],
        groups: Sequence[int],
        device: torch.device,
        members: Sequence[int] | None = None,
    ) -> None:
        self.kinds: list[SegmentKind] = []
        self.aligned = False
        self.entries = torch.zeros(0, COLUMNS, dtype=torch.int64)
        self._members = range(len(rows)) if members is None else members
        coarse, exact = (
            _work([(i, rows[n][2]) for i, n in enumerate(self._members) if rows[n][0] is wanted])
            for wanted in (True, False)
        )
        self.quantized_items = len(coarse)
        self.work = upload(torch.from_numpy(np.concatenate((coarse, exact))), device)
        self._rows, self._groups, self._device = rows, groups, device
        self._uploaded: list[list[int]] = []

    def refresh(self, params: Sequence[Tensor], masters: Mapping[int, Tensor]) -> None:
        """Bring the table up to date. Raises ValueError for a gradient the kernels cannot read."""
        kinds: dict[SegmentKind, int] = {}
        entries = []
        for index in self._members:
            param = params[index]
            grad, master = param.grad, masters.get(index)
            kind, grad_at = 0, 0
            if grad is not None:
                if not grad.is_contiguous() or grad.dtype not in DTYPES:
                    raise ValueError(f"gradient {index} ({grad.dtype}) must be contiguous")
                key = SegmentKind(param.dtype, grad.dtype, master is not None)
                kind, grad_at = kinds.setdefault(key, len(kinds)), grad.data_ptr()
            master_at = 0 if master is None else master.data_ptr()
            addresses = [param.data_ptr(), grad_at, master_at]
            sizes = [param.numel(), self._rows[index][1], kind, self._groups[index], index]
            entries.append(addresses + sizes)
        self.kinds = list(kinds)
        if entries != self._uploaded:
            self.aligned = all(value % 16 == 0 for entry in entries for value in entry[:4])
            self.entries = upload(torch.tensor(entries, dtype=torch.int64), self._device)
            self._uploaded = entries


def adamw_flat_(
    moments: FlatMoments,
    table: SegmentTable,
    groups: Tensor,
    grad_scale: Tensor,
    max_norm: float,
    rounding: Rounding,
    stochastic_seed: int | None,
    checked: Sequence[Tensor],
) -> Tensor:
    """One step of every parameter in `table` that has a gradient, or of none if one is not finite.

    `groups` is float64 (groups, 5): lr, beta1, beta2, eps, weight decay. `grad_scale` fp32 (1,)
    multiplies the gradients, and clipping to `max_norm` follows. `checked` are the moments that
    must be finite as well. Returns fp32 (3,): the norm before clipping, the factor applied to the
    gradients, and 1 if all was finite, else 0.
    """
    device = moments.steps.device
    items = len(table.work)
    programs = min(NORM_PROGRAMS, items)
    partials = torch.empty(len(table.kinds) * programs + 1, dtype=torch.float64, device=device)
    # Not finite if a moment is not, and nothing otherwise.
    norms = torch._foreach_norm(list(checked), 2, torch.float64)
    partials[-1] = torch.stack(norms).mul_(0.0).sum()
    count = len(table.entries)
    factors = torch.empty(count, FACTORS, dtype=torch.float32, device=device)
    outcome = torch.empty(3, dtype=torch.float32, device=device)
    with on_device(moments.steps):
        for number, kind in enumerate(table.kinds):
            launch(grad_norm_kernel, (programs,))(
                table.entries, table.work, partials[number * programs :], items,
                KIND=number, GRAD=getattr(tl, DTYPES[kind.grad]), ALIGNED=table.aligned,
                ROWS=WORK_ROWS, num_warps=NUM_WARPS,
            )  # fmt: skip
        launch(prepare_kernel, (1,))(
            table.entries, groups, partials, grad_scale, moments.steps, moments.skipped, factors,
            outcome, count, len(partials), min(max_norm, torch.finfo(torch.float32).max),
            BLOCK=PREPARE_BLOCK,
        )  # fmt: skip
        for number in range(len(table.kinds)):
            for quantized in (True, False):
                _launch_update(
                    moments, table, factors, outcome, number, quantized, rounding, stochastic_seed
                )
    return outcome


def _launch_update(
    moments: FlatMoments,
    table: SegmentTable,
    factors: Tensor,
    outcome: Tensor,
    number: int,
    quantized: bool,
    rounding: Rounding,
    stochastic_seed: int | None,
) -> None:
    kind = table.kinds[number]
    m, v = (moments.m_codes, moments.v_codes) if quantized else (moments.m_exact, moments.v_exact)
    skip = 0 if quantized else table.quantized_items
    items = table.quantized_items if quantized else len(table.work) - skip
    if items == 0:
        return
    nearest, device = rounding == "nearest", m.device
    m_cells, m_thresholds = magnitude_tables(True, device)
    v_cells, v_thresholds = magnitude_tables(False, device)
    launch(adamw_kernel, (items,))(
        table.entries, table.work[skip:], factors, outcome, moments.steps, m, v, moments.m_absmax,
        moments.v_absmax, dynamic_map(True, device), dynamic_map(False, device),
        m_cells if nearest else grid_table(True, device),
        v_cells if nearest else grid_table(False, device), m_thresholds, v_thresholds,
        stochastic_seed or 0,
        KIND=number, PARAM=getattr(tl, DTYPES[kind.param]), GRAD=getattr(tl, DTYPES[kind.grad]),
        MASTER=kind.master, QUANTIZED=quantized, NEAREST=nearest,
        STOCHASTIC=stochastic_seed is not None and kind.param == torch.bfloat16,
        ALIGNED=table.aligned, ROWS=WORK_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
