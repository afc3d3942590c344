"""AdamW with 8-bit moments (`kernels.adamw8bit`) as a torch optimiser.

The codes are those that bitsandbytes' AdamW8bit would hold on the same device: block size 256,
parameters under `min_8bit_size` elements in fp32, and the rounding bitsandbytes uses there. A step
whose gradients are not all finite changes nothing but `skipped_steps`. Where Triton runs, a step is
a handful of launches for all parameters together and never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kernels.adamw8bit import ROW, Update, adamw_slab_, may_step
from kernels.adamw8bit.dynamic_map import Rounding
from kernels.adamw8bit.launch import SegmentTable, adamw_flat_
from kernels.adamw8bit.step_compiled import adamw_rows_
from kernels.runtime.cores import use_compiled
from kernels.runtime.device import upload
from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import once_per_shape
from optim.clip import clip_coefficient, global_norm
from optim.flat_state import (
    FlatState,
    Slab,
    check_loadable,
    least_8bit_sizes,
    refuse_unusable,
    slabs,
)
from optim.interface import StepOptimizer, optimizer_observer

LowPrecision = Literal["nearest", "stochastic", "master"]


class RoundingOptions(TypedDict, total=False):
    """The last keyword arguments of `AdamW8bit`; `Precision` says what they mean."""

    low_precision: LowPrecision
    seed: int
    rounding: Rounding | None


@dataclass(frozen=True)
class Precision:
    """How numbers are rounded.

    `low_precision` says how bf16 and fp16 parameters follow the fp32 update: rounded to `nearest`
    (as bitsandbytes), rounded `stochastic`ally (bf16 only, a pure function of `seed`, step and
    position), or copied from an fp32 `master` beside them. `rounding` overrides how moments are
    rounded to 8 bits; by default as bitsandbytes rounds on the parameters' device.
    """

    low_precision: LowPrecision = "nearest"
    seed: int = 0
    rounding: Rounding | None = None

    def __post_init__(self) -> None:
        if self.low_precision not in ("nearest", "stochastic", "master"):
            raise ValueError(f"low_precision does not know {self.low_precision!r}")

    @property
    def stochastic_seed(self) -> int | None:
        return self.seed if self.low_precision == "stochastic" else None


class AdamW8bit(StepOptimizer):
    """AdamW with decoupled weight decay and block-wise 8-bit moments.

    All parameters must be contiguous, of floating point, and on one device; they are updated in
    place. A parameter without a gradient is left out of a step, as in torch. The keywords
    `low_precision`, `seed` and `rounding` are those of `Precision`. A group may have a
    `min_8bit_size` of its own.

    `grad_norm` is the norm that the last step clipped by, on the device, or None.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        block_size: int = ROW,
        min_8bit_size: int = 4096,
        **rounding: Unpack[RoundingOptions],
    ) -> None:
        if lr < 0.0 or eps < 0.0 or weight_decay < 0.0:
            raise ValueError(
                f"lr, eps and weight_decay must not be negative, got {lr}, {eps}, {weight_decay}"
            )
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if block_size != ROW:
            raise ValueError(f"moments are quantised in blocks of {ROW}, got {block_size}")
        self._min_8bit_size = min_8bit_size
        self._precision = Precision(**rounding)
        self.grad_norm: Tensor | None = None
        self._flat: FlatState | None = None
        self._tables: dict[tuple[int, ...] | None, SegmentTable] = {}
        self._settings: tuple[list[list[float]], Tensor] | None = None
        self._plans: dict[tuple[int, ...], list[Slab]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. Waits for the device."""
        return 0 if self._flat is None else int(self._flat.skipped)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those already here keep their moments."""
        super().add_param_group(param_group)
        if self._flat is not None:
            before, self._flat = self._flat, None
            self._built().adopt(before)

    @overload
    def step(
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        max_norm: float = math.inf,
        only: tuple[int, ...] | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        grad_scale: float | Tensor = 1.0,
        max_norm: float = math.inf,
        only: tuple[int, ...] | None = None,
    ) -> float: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        max_norm: float = math.inf,
        only: tuple[int, ...] | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient; or none, if one or a moment is not finite,
        or the scaled gradients are longer than `kernels.adamw8bit.LARGEST_NORM`.

        The gradients themselves stay as they are: `grad_scale`, a number or a tensor () on the
        parameters' device, multiplies them as they are read, and then they are clipped to the
        global norm `max_norm`. With `only`, numbers of parameters in the order of the groups, the
        others are neither looked at nor moved; a parameter moves to the same bits either way.
        """
        if not max_norm > 0.0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        observer, whole = optimizer_observer(), only is None
        observer.step_begins([p.grad for p in self.ordered_params() if p.grad is not None], whole)
        if use_triton(self._built().m_absmax):
            self._step_flat(grad_scale, max_norm, only)
        else:
            self._step_reference(grad_scale, max_norm, only)
        observer.step_ends(whole)
        return loss

    def _step_reference(
        self, grad_scale: float | Tensor, max_norm: float, only: tuple[int, ...] | None
    ) -> None:
        flat = self._built()
        params = self.ordered_params()
        numbers = range(len(params)) if only is None else only
        grads = {i: grad for i in numbers if (grad := params[i].grad) is not None}
        if math.isfinite(max_norm) and grads:
            size = torch.as_tensor(grad_scale).abs()
            self.grad_norm = global_norm(list(grads.values())) * size
            grad_scale = grad_scale * clip_coefficient(self.grad_norm, max_norm)
        scale = [grad_scale] if isinstance(grad_scale, Tensor) else []
        if not may_step(list(grads.values()), grad_scale, [*scale, *flat.scales(only)]):
            flat.skipped += 1
            return
        active = list(grads)
        for members, update in self._runs(active):
            compiled = _compiled_members(flat, members, params, grads, update)
            _step_compiled(flat, compiled, params, grads, update, grad_scale)
            rest = tuple(i for i in members if i not in compiled) if compiled else members
            for slab in self._plan(rest):
                _step_slab(flat, slab, params, grads, update, grad_scale)
        flat.steps[active] += 1

    def _step_flat(
        self, grad_scale: float | Tensor, max_norm: float, only: tuple[int, ...] | None
    ) -> None:
        flat, params = self._built(), self.ordered_params()
        device = flat.steps.device
        table = self._tables.get(only)
        if table is None:
            groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
            table = self._tables[only] = flat.table(groups, only)
        table.refresh(params, flat.masters)
        settings = [
            [float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"]]
            for group in self.param_groups
        ]
        if self._settings is None or self._settings[0] != settings:
            self._settings = settings, upload(torch.tensor(settings, dtype=torch.float64), device)
        if not isinstance(grad_scale, Tensor):
            grad_scale = torch.full((1,), grad_scale, dtype=torch.float32, device=device)
        outcome = adamw_flat_(
            flat.flat_moments(),
            table,
            self._settings[1],
            grad_scale.to(torch.float32).view(1),
            max_norm,
            self._rule(),
            self._precision.stochastic_seed,
            flat.scales(only),
        )
        self.grad_norm = outcome[0]

    def set_skipped(self, count: int) -> None:
        """Say how many steps were skipped before."""
        self._built().skipped.fill_(count)

    def parameter_state(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, with its number of steps, without copies."""
        return self._built().views(index)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as named tensors, without copies, for a checkpoint that holds no pickle.

        Hyper-parameters are not in it: they belong to the run's configuration.
        """
        return self._built().tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError if it is of other parameters."""
        self._built().load(tensors)

    def state_dict(self) -> dict[str, Any]:
        """torch's layout; per parameter `step`, `exp_avg`, `exp_avg_sq` and, in 8 bits, absmax."""
        flat = self._built()
        return super().state_dict() | {"skipped_steps": int(flat.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict` bit for bit. Raises ValueError if it does not fit the parameters."""
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"the state has parameter groups of {saved_sizes} parameters, expected {sizes}"
            )
        flat = self._built()
        saved = state_dict["state"]
        mine = [self.state[param] for param in self.ordered_params()]
        for index, tensors in enumerate(mine):
            check_loadable(f"parameter {index}", tensors, saved.get(index, {}))
        for index, tensors in enumerate(mine):
            for name, tensor in tensors.items():
                tensor.copy_(saved[index][name])
        flat.skipped.fill_(state_dict.get("skipped_steps", 0))
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({k: v for k, v in saved_group.items() if k != "params"})

    def _built(self) -> FlatState:
        """The flat state, made at first use, so that a model may still be moved before training."""
        if self._flat is None:
            params = self.ordered_params()
            refuse_unusable(params)
            masters, own = self._precision.low_precision == "master", self._min_8bit_size
            with optimizer_observer().building_state():
                self._flat = FlatState(params, least_8bit_sizes(self.param_groups, own), masters)
            self._plans.clear()
            self._tables.clear()
            for index, param in enumerate(params):
                self.state[param] = self._flat.views(index)
        return self._flat

    def _rule(self) -> Rounding:
        return self._precision.rounding or ("grid" if self._built().steps.is_cpu else "nearest")

    def _runs(self, active: list[int]) -> list[tuple[tuple[int, ...], Update]]:
        """The active parameters in sets that share group and step count, with their update."""
        steps = self._built().steps.tolist()
        first, runs = 0, []
        for group in self.param_groups:
            last = first + len(group["params"])
            members = [i for i in active if first <= i < last]
            first = last
            for step in sorted({steps[i] for i in members}):
                update = Update(
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=step + 1,
                    rounding=self._rule(),
                    stochastic_seed=self._precision.stochastic_seed,
                )
                runs.append((tuple(i for i in members if steps[i] == step), update))
        return runs

    def _plan(self, members: tuple[int, ...]) -> list[Slab]:
        plan = self._plans.get(members)
        if plan is None:
            segments = [self._built().segments[i] for i in members]
            plan = slabs(sorted(segments, key=lambda s: (s.quantized, s.row)))
            self._plans[members] = plan
        return plan


def _compiled_members(
    flat: FlatState,
    members: tuple[int, ...],
    params: list[Tensor],
    grads: Mapping[int, Tensor],
    update: Update,
) -> dict[int, int]:
    """The first row of each of `members` whose step can be the compiled loop."""
    if update.rounding != "grid" or not use_compiled(flat.m_codes):
        return {}
    exact = torch.float32
    return {
        i: flat.segments[i].row
        for i in members
        if flat.segments[i].quantized
        and params[i].dtype == grads[i].dtype == exact
        and grads[i].is_contiguous()
    }


def _step_compiled(
    flat: FlatState,
    rows: Mapping[int, int],
    params: list[Tensor],
    grads: Mapping[int, Tensor],
    update: Update,
    grad_scale: float | Tensor,
) -> None:
    if not rows or flat.m_codes.is_meta:
        return
    adamw_rows_(
        [params[i].detach() for i in rows],
        [grads[i] for i in rows],
        list(rows.values()),
        flat.flat_moments(),
        update,
        float(grad_scale),
    )


def _slab_memory(flat: FlatState, slab: Slab, params: list[Tensor], *_: object) -> object:
    """What decides how much memory the step of a slab takes."""
    pieces = tuple((p.end - p.begin, params[p.index].dtype) for p in slab.pieces)
    return slab.quantized, slab.rows, pieces


@once_per_shape(_slab_memory)
def _step_slab(
    flat: FlatState,
    slab: Slab,
    params: list[Tensor],
    grads: Mapping[int, Tensor],
    update: Update,
    grad_scale: float | Tensor,
) -> None:
    stored = [
        params[piece.index].detach().view(-1)[piece.begin : piece.end] for piece in slab.pieces
    ]
    targets = list(stored)
    for i, piece in enumerate(slab.pieces):
        if piece.index in flat.masters:
            targets[i] = flat.masters[piece.index][piece.begin : piece.end]
    parts = [grads[piece.index].reshape(-1)[piece.begin : piece.end] for piece in slab.pieces]
    adamw_slab_(slab.pieces, targets, parts, flat.moments(slab), update, grad_scale)
    for param, target in zip(stored, targets, strict=True):
        if target is not param:
            param.copy_(target)
