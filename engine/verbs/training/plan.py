"""`engine plan`: a memory plan as text and as JSON."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from engine.config.choices import GPU_TFLOPS
from engine.config.sources import build
from engine.config.train_config import TrainConfig
from engine.distributed.group import processes_here
from engine.errors import ConfigError, MemoryPlanError, gib
from engine.memory.auto_policy import chunk_of
from engine.memory.estimate import MemoryPlan
from engine.memory.find_model import find_model, noted_quantisation, quantised_files, stored_in_nf4
from engine.memory.model_shapes import preset_config
from engine.memory.options import NAMES, flag
from engine.memory.process import PROCESS, refusal
from engine.memory.run_planner import (
    KnownRows,
    RunPlanner,
    compute_dtype,
    read_known_rows,
    usable_memory,
    with_new_rows,
)
from engine.memory.search import Choice, Planner, changed, choose
from engine.memory.simulate.meter import OWNERS
from engine.memory.simulate.stored_model import stored_model
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import describe_model
from engine.model_sources.quantised.fates import run_fate, stored_line
from engine.model_sources.scratch.open_base import describe_base
from engine.runs.stored import CONFIG, read_settings
from engine.training.checks import check_model, check_request
from engine.training.cpu_dtype import with_cpu_dtype
from engine.training.init_adapter import with_init_adapter
from engine.training.row_set import RowSet
from engine.training.trainable import targets_of
from models.config.model_config import ModelConfig
from models.tensor_names import parameter_count

_LONGEST_ROW = 1 << 20


@dataclass(frozen=True)
class Target:
    """What is planned for: a model's shape and a kind of machine.

    `noted` is what the model's config.json says of quantised weights, `files` has them where they
    are at hand.
    """

    title: str
    model: ModelConfig
    gpu: bool
    stored: torch.dtype
    plan: Planner
    rows: KnownRows
    noted: Mapping[str, Any] = field(default_factory=dict)
    files: ModelSource | None = None

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
    Everything that `engine train` checks without weights is checked (`engine.training.checks`),
    and the rows are read: where the model has a tokenizer at hand, their lengths are planned for.
    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    if config.device == "auto":
        gpu = torch.cuda.is_available() or preset_config(config.model) is not None
    else:
        gpu = config.device.startswith("cuda")
    runs_on = torch.device("cuda" if gpu else "cpu"), compute_dtype(config, gpu)
    config = with_init_adapter(config)
    check_request(config, runs_on)
    scratch = config.method == "scratch"
    if scratch:
        model, stored = describe_base(config).config, torch.float32
    else:
        model, stored = find_model(config.model, config.revision)
        model = with_new_rows(config, model)
    check_model(config, model, runs_on, disk=config.output_dir is not None)
    machine = "a CUDA GPU" if gpu else "the CPU"
    rows = read_known_rows(config, model)
    noted = {} if scratch else noted_quantisation(config.model, config.revision)
    teacher = None if config.teacher is None else describe_model(config.teacher).config
    files = None if scratch else quantised_files(config.model)
    model = model if files is None else with_new_rows(config, stored_model(files))
    planner = RunPlanner(model, gpu, stored, rows, teacher)
    title = f"{config.model} on {machine}"
    return Target(title, model, gpu, stored, planner, rows, noted, files)


def fit(config: TrainConfig, target: Target) -> tuple[Choice, int]:
    """The fastest settings within the memory that a run may take, and how much that is.

    It is `memory_budget` or `fit_memory`, the smaller of them, or else what this machine has.
    Raises `ConfigError` where it is a GPU's that is not here, `MemoryPlanError` where nothing fits.
    """
    sizes = [size for size in (config.memory_budget, config.fit_memory) if isinstance(size, int)]
    limit = min(sizes) if sizes else usable_memory(target.gpu)
    if limit is not None and not sizes and not target.gpu:
        limit //= processes_here(config)
    if limit is None:
        raise ConfigError(
            "--fit-memory auto (as in --preset auto) plans for the GPU of this machine, and there "
            "is none. Name a GPU's memory, as in --fit-memory 15GiB, or plan for the CPU with "
            "--device cpu."
        )
    if not target.gpu and limit <= PROCESS:
        raise MemoryPlanError(refusal(limit, PROCESS))
    return choose(config, limit, target.plan), limit


def with_fitted(config: TrainConfig) -> tuple[TrainConfig, RowSet | None]:
    """`config` with the settings chosen that `fit_memory` leaves to the planner.

    With them the rows, if they were tokenised for that. A run that goes on has the settings that it
    was begun with. Raises as `find_target` and `fit` do.
    """
    if config.fit_memory is None:
        return config, None
    output, rows = config.output_dir, None
    if config.resume is not None and output is not None and (output / CONFIG).is_file():
        own = build(TrainConfig, read_settings(output))
        update = {name: getattr(own, name) for name in NAMES}
    else:
        target = find_target(config)
        planned, rows = fit(config, target)[0].plan.config, target.rows.row_set
        update = {name: getattr(planned, name) for name in NAMES}
    return changed(config, fit_memory=None, **update), rows


def fitted_changes(asked: TrainConfig, fitted: TrainConfig) -> str:
    """The settings that differ, as the command line takes them."""
    names = (name for name in NAMES if getattr(asked, name) != getattr(fitted, name))
    return " ".join(flag(name, getattr(fitted, name)) for name in names)


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

    With a memory budget or `fit_memory` the fastest settings that fit are chosen; `tried` is told
    how many plans were made so far. Raises `ConfigError` for a model or GPU that is not known,
    `DataError` for rows that cannot be used, `MemoryPlanError` where nothing fits.
    """
    target = find_target(config)
    if tried is not None:
        target = replace(target, plan=told(target.plan, tried))
    config = with_cpu_dtype(config, target.gpu, target.model)
    if stored_in_nf4(target.noted):  # what is loaded has the scales that the files have
        nested = bool(target.noted.get("bnb_4bit_use_double_quant"))
        config = config.model_copy(update={"double_quant": nested})
    rate = rate_of(gpu) if gpu else target.rate()
    started, choice, limit = time.perf_counter(), None, config.memory_budget
    if limit is not None or config.fit_memory is not None:
        choice, limit = fit(config, target)
    planned = target.plan(config) if choice is None else choice.plan
    return PlanReport(target, planned, choice, rate, time.perf_counter() - started, limit)


def rate_of(gpu: str) -> float:
    """Operations per second of a GPU by its name, as `RTX 4090` or `h100`, or by its TFLOP/s."""
    name = re.sub(r"^(nvidia|tesla|geforce|rtx)+|[^a-z0-9.]", "", gpu.lower().replace(" ", ""))
    if name in GPU_TFLOPS:
        return GPU_TFLOPS[name] * 1e12
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
    budget: int | None = None

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
            "merge_host_bytes": self._merging,
            "reserve": planned.reserve,
            "host_bytes": planned.host,
            "batch_host_bytes": planned.batch_host,
            "allocated_bytes": planned.allocated,
            "total_bytes": planned.total,
            "budget_bytes": self.budget,
            "rows": self.target.rows.count,
            "longest_row_tokens": max(self.target.rows.lengths or (0,)) or None,
            "assumed": self._assumed(),
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

    @cached_property
    def _merging(self) -> int | None:
        """Host memory for merging what the run trains; None after full fine-tuning."""
        config = self.plan.config
        if config.every_weight:
            return None
        from engine.memory.merging import merge_peak

        targets = targets_of(config, self.target.model)
        adapter = 4 * self.plan.trainable
        return merge_peak(self.target.model, self.target.stored, targets, adapter)

    def _peaks(self) -> list[tuple[str, Any]]:
        return [("load", self.plan.load), ("step", self.plan.step), ("save", self.plan.save)]

    def _assumed(self) -> list[str]:
        """What the plan takes the rows and the teacher to be, a line each."""
        lines = [self.target.rows.text(self.plan.config)]
        files = self.target.files
        if files is not None:
            lines.append(f"model: {stored_line(files, run_fate(self.plan.config, files))}")
        elif self.target.noted:
            lines.append(_stored_as(self.target.noted, self.plan.config.method))
        if self.plan.config.teacher is not None:
            lines.append(
                "teacher: its weights are counted; what its forward pass needs beside them is not"
            )
        return lines

    def text(self) -> str:
        """The table that `engine plan` prints."""
        planned, config = self.plan, self.plan.config
        settings = ", ".join(
            f"{name} {self._shown(name)}"
            for name in _SHOWN
            if name in _ALWAYS_SHOWN or getattr(config, name) != _default(name)
        )
        count, dtype = parameter_count(self.target.model), str(planned.dtype).removeprefix("torch.")
        lines = [f"{self.target.title}, {dtype}, {count:,} parameters", settings]
        lines += [*self._assumed(), ""]
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
        merging = self._merging
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
        if self.choice is None or self.budget is None:
            return []
        lines = [
            "",
            f"budget {gib(self.budget)}: {self.choice.why} ({self.choice.tried} plans made)",
        ]
        for name, (before, after) in self.choice.changes.items():
            lines.append(f"  {flag(name, after)}  (asked for {_text(before)})")
        return lines


_SHOWN = (
    "method", "lora_rank", "batch_size", "accumulate", "max_length", "gradient_checkpointing",
    "keep_decoded", "loss_chunk_tokens", "optimizer_in_backward", "mlp_tile_tokens",
    "low_memory_decode", "head_precision", "embedding_on", "offload", "objective", "share_prompt",
)  # fmt: skip


_ALWAYS_SHOWN = _SHOWN[:8]


def _default(name: str) -> object:
    return TrainConfig.model_fields[name].default


def _text(value: object) -> str:
    """A setting as the command line takes it."""
    return (",".join(value) or "none") if isinstance(value, tuple) else str(value)


def _present(owners: dict[str, int]) -> dict[str, int]:
    return {owner: size for owner, size in owners.items() if size}


def _stored_as(noted: Mapping[str, Any], method: str) -> str:
    """A line about a model whose files are quantised."""
    named = str(noted.get("quant_method", "quantised"))
    if not stored_in_nf4(noted):
        return f"model: stored by {named}; its weights are decoded as they load"
    if method != "qlora":
        return f"model: stored in NF4 by {named}; its weights are decoded for --method {method}"
    scales = "nested" if noted.get("bnb_4bit_use_double_quant") else "plain"
    return (
        f"model: stored in NF4 by {named} with {scales} scales, and used as it is; layers that "
        "were left in 16 bits are counted in 4"
    )
