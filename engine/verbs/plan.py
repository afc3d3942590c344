"""`engine plan`: a memory plan as text and as JSON."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine.config.choices import GPU_TFLOPS
from engine.config.train_config import TrainConfig
from engine.device import resolve_device, resolve_dtype
from engine.errors import ConfigError
from engine.memory.auto_policy import chunk_of, resolve_policy
from engine.memory.decoded import resolve_decoded, spare_memory
from engine.memory.estimate import MemoryPlan
from engine.memory.estimate import plan as plan_memory
from engine.memory.find_model import find_model
from engine.memory.model_shapes import preset_config
from engine.memory.options import flag
from engine.memory.search import Choice, Planner, changed, choose
from engine.memory.simulate.meter import OWNERS, gib
from engine.training.checks import check_model, check_request
from engine.training.cpu_dtype import with_cpu_dtype
from engine.training.init_adapter import with_init_adapter
from engine.training.trainable import targets_of
from models.config.model_config import ModelConfig
from models.tensor_names import parameter_count

_LONGEST_ROW = 1 << 20


@dataclass(frozen=True)
class Target:
    """What is planned for: a model's shape and a kind of machine."""

    title: str
    model: ModelConfig
    gpu: bool
    stored: torch.dtype
    plan: Planner

    @property
    def longest_row(self) -> int:
        """Where the search for the longest row ends."""
        return _LONGEST_ROW

    def rate(self) -> float:
        """Operations per second: a typical GPU's, or this CPU's, measured in a moment."""
        return 1e12 * GPU_TFLOPS["4090"] if self.gpu else _cpu_rate()


def find_target(config: TrainConfig) -> Target:
    """The model and machine of these settings.

    `--device auto` means this machine, and a CUDA GPU where the model is named by a preset.
    Everything that `engine train` checks without weights is checked (`engine.training.checks`).
    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    if config.device == "auto":
        gpu = torch.cuda.is_available() or preset_config(config.model) is not None
    else:
        gpu = config.device.startswith("cuda")
    runs_on = torch.device("cuda" if gpu else "cpu"), compute_dtype(config, gpu)
    config = with_init_adapter(config)
    check_request(config, runs_on)
    model, stored = find_model(config.model, config.revision)
    check_model(config, model, runs_on, disk=config.output_dir is not None)
    machine = "a CUDA GPU" if gpu else "the CPU"
    planner = partial(_plan, model, gpu, stored)
    return Target(f"{config.model} on {machine}", model, gpu, stored, planner)


def _plan(model: ModelConfig, gpu: bool, stored: torch.dtype, config: TrainConfig) -> MemoryPlan:
    dtype = compute_dtype(config, gpu)
    if config.gradient_checkpointing == "auto":
        config = changed(config, gradient_checkpointing=_auto_policy(model, gpu, dtype, config))
    make = partial(plan_memory, model, gpu=gpu, dtype=dtype, stored=stored)
    limit = spare_memory(config, torch.device("cuda")) if gpu else config.memory_budget
    keep, made = resolve_decoded(config, model.num_hidden_layers, limit, make)
    return made or make(changed(config, keep_decoded=keep))


def _auto_policy(model: ModelConfig, gpu: bool, dtype: torch.dtype, config: TrainConfig) -> str:
    """What auto comes to; "selective" for a GPU that is not here, whose memory nobody knows."""
    if gpu and config.memory_budget is None and not torch.cuda.is_available():
        return "selective"
    return resolve_policy(model, config, torch.device("cuda" if gpu else "cpu"), dtype)


def told(planner: Planner, tried: Callable[[int], None]) -> Planner:
    """The same planner, which says how many plans it has made after each of them."""
    numbers = itertools.count(1)

    def plan_and_tell(config: TrainConfig) -> MemoryPlan:
        made = planner(config)
        tried(next(numbers))
        return made

    return plan_and_tell


def plan(
    config: TrainConfig, gpu: str | None = None, tried: Callable[[int], None] | None = None
) -> PlanReport:
    """Plan a run: its memory, and the time of a step on `gpu` (a name or TFLOP/s).

    With a memory budget the fastest settings that fit are chosen; `tried` is told how many plans
    were made so far. Raises `ConfigError` for a model or GPU that is not known, `MemoryPlanError`
    where nothing fits the budget.
    """
    target = find_target(config)
    if tried is not None:
        target = replace(target, plan=told(target.plan, tried))
    config = with_cpu_dtype(config, target.gpu, target.model)
    rate = rate_of(gpu) if gpu else target.rate()
    started, choice = time.perf_counter(), None
    if config.memory_budget is not None:
        choice = choose(config, config.memory_budget, target.plan)
    planned = target.plan(config) if choice is None else choice.plan
    return PlanReport(target, planned, choice, rate, time.perf_counter() - started)


def rate_of(gpu: str) -> float:
    """Operations per second of a GPU by its name or number."""
    if gpu.lower() in GPU_TFLOPS:
        return GPU_TFLOPS[gpu.lower()] * 1e12
    try:
        rate = float(gpu)
    except ValueError:
        rate = 0.0
    if not 0 < rate < 1e6:
        raise ConfigError(
            f"--gpu is {gpu!r}; it should be one of {', '.join(GPU_TFLOPS)}, or a number of "
            "TFLOP/s."
        )
    return rate * 1e12


def compute_dtype(config: TrainConfig, gpu: bool) -> torch.dtype:
    """The type a run computes in; a GPU that is not here is taken to know bf16."""
    if not gpu:
        return resolve_dtype(config.dtype, torch.device("cpu"))
    if config.dtype == "auto":
        return (
            resolve_dtype("auto", resolve_device("cuda"))
            if torch.cuda.is_available()
            else (torch.bfloat16)
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _cpu_rate(size: int = 384) -> float:
    left = torch.ones(size, size)
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


@dataclass(frozen=True)
class PlanReport:
    """A plan with what was chosen for it."""

    target: Target
    plan: MemoryPlan
    choice: Choice | None
    rate: float
    planning_seconds: float

    @property
    def seconds(self) -> float:
        """Time of one optimizer step, at best."""
        return self.plan.seconds(self.rate)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for programs; bytes are integers."""
        planned, config = self.plan, self.plan.config
        changes = self.choice.changes if self.choice else {}
        return {
            "model": config.model,
            "device": "cuda" if planned.gpu else "cpu",
            "dtype": str(planned.dtype).removeprefix("torch."),
            "parameters": parameter_count(self.target.model),
            "settings": {name: getattr(config, name) for name in _SHOWN},
            "loss_chunk_tokens": self._chunk(),
            "peaks": {
                name: {"bytes": peak.bytes, "owners": _present(peak.owners)}
                for name, peak in self._peaks()
            },
            "save_host_bytes": planned.save_host,
            "merge_host_bytes": self._merging(),
            "reserve": planned.reserve,
            "host_bytes": planned.host,
            "batch_host_bytes": planned.batch_host,
            "allocated_bytes": planned.allocated,
            "total_bytes": planned.total,
            "budget_bytes": config.memory_budget,
            "trainable_parameters": planned.trainable,
            "tokens_per_step": planned.tokens,
            "flops_per_step": planned.flops,
            "seconds_per_step": planned.seconds(self.rate),
            "flops_per_second": self.rate,
            "changes": {name: list(pair) for name, pair in changes.items()},
            "why": self.choice.why if self.choice else None,
            "planning_seconds": self.planning_seconds,
        }

    def _chunk(self) -> int:
        """Trained tokens in a chunk of the loss."""
        planned = self.plan
        return chunk_of(planned.config, self.target.model, planned.dtype, planned.gpu)

    def _shown(self, name: str) -> str:
        value = getattr(self.plan.config, name)
        chosen = f" ({self._chunk()})" if (name, value) == ("loss_chunk_tokens", "auto") else ""
        return f"{_text(value)}{chosen}"

    def _merging(self) -> int | None:
        """Host memory for merging what the run trains; None after full fine-tuning."""
        config = self.plan.config
        if config.method == "full":
            return None
        from engine.verbs.merge import host_peak

        targets = targets_of(config, self.target.model)
        adapter = 4 * self.plan.trainable
        return host_peak(self.target.model, self.target.stored, targets, adapter)

    def _peaks(self) -> list[tuple[str, Any]]:
        return [("load", self.plan.load), ("step", self.plan.step), ("save", self.plan.save)]

    def text(self) -> str:
        """The table that `engine plan` prints."""
        planned, config = self.plan, self.plan.config
        settings = ", ".join(
            f"{name} {self._shown(name)}"
            for name in _SHOWN
            if name in _ALWAYS_SHOWN or getattr(config, name) != _default(name)
        )
        count, dtype = parameter_count(self.target.model), str(planned.dtype).removeprefix("torch.")
        lines = [f"{self.target.title}, {dtype}, {count:,} parameters", settings, ""]
        lines.append(f"{'':<22}{'step':>12}{'between steps':>15}")
        for owner in OWNERS:
            step, rest = planned.step.owners.get(owner, 0), planned.save.owners.get(owner, 0)
            if max(step, rest) >= 1024:
                lines.append(f"{owner:<22}{gib(step):>12}{gib(rest):>15}")
        lines.append(f"{'tensors':<22}{gib(planned.step.bytes):>12}{gib(planned.save.bytes):>15}")
        lines += [f"{name:<22}{gib(size):>12}  assumed" for name, size in planned.reserve.items()]
        lines += ["", f"peak of loading  {gib(planned.load.bytes)}"]
        lines.append(f"peak of a step   {gib(planned.step.bytes)}")
        host = f", and {gib(planned.save_host)} of host memory" if planned.save_host else ""
        lines.append(f"peak of saving   {gib(planned.save.bytes)}{host}")
        merging = self._merging()
        if merging is not None:
            lines.append(f"peak of merging  {gib(merging)} of host memory")
        lines.append(f"needed           {gib(planned.total)}")
        if planned.host:
            lines.append(f"offloaded to the host {gib(planned.host)}")
        if planned.batch_host:
            lines.append(f"batches on the host {gib(planned.batch_host)}, this step's and the next")
        seconds = planned.seconds(self.rate)
        lines += [
            "",
            f"{planned.trainable:,} trainable parameters; {planned.flops / 1e12:.1f} TFLOP and "
            f"{planned.tokens:,} tokens a step; at {self.rate / 1e12:.3g} TFLOP/s at best "
            f"{seconds:.2f} s, {planned.tokens / seconds:,.0f} tokens/s",
        ]
        return "\n".join(lines + self._chosen())

    def _chosen(self) -> list[str]:
        budget = self.plan.config.memory_budget
        if self.choice is None or budget is None:
            return []
        lines = ["", f"budget {gib(budget)}: {self.choice.why} ({self.choice.tried} plans made)"]
        for name, (before, after) in self.choice.changes.items():
            lines.append(f"  {flag(name, after)}  (asked for {_text(before)})")
        return lines


_SHOWN = (
    "method",
    "lora_rank",
    "batch_size",
    "accumulate",
    "max_length",
    "gradient_checkpointing",
    "keep_decoded",
    "loss_chunk_tokens",
    "optimizer_in_backward",
    "mlp_tile_tokens",
    "low_memory_decode",
    "head_precision",
    "embedding_on",
    "offload",
)


_ALWAYS_SHOWN = _SHOWN[:8]


def _default(name: str) -> object:
    return TrainConfig.model_fields[name].default


def _text(value: object) -> str:
    """A setting as the command line takes it."""
    return (",".join(value) or "none") if isinstance(value, tuple) else str(value)


def _present(owners: dict[str, int]) -> dict[str, int]:
    return {owner: size for owner, size in owners.items() if size}
