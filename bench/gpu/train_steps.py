"""The step as `engine train` runs it, with its plan beside it.

Weights are random; everything else is what a run of the same settings makes: loading and
quantising (`build_for`), adapters, optimizer, the policy that `auto` comes to, loss chunks. Packed
batches have documents of ragged lengths. Models that a GPU would take long to fill have fewer
layers, as `layers` says.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu.step import summary
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.timing import clear, synchronize
from engine.memory.auto_policy import planned_policy
from engine.memory.estimate import Workload, plan
from engine.selfcheck.steps import batch_of, build_step, run_config
from engine.training.determinism import deterministic
from models.config.model_config import ModelConfig

_PACKED = (4001, 2777, 2048, 1999, 1500, 1024, 900, 700, 513, 400, 257, 130, 100, 31, 3, 1)
_SMALL = (9, 7, 5, 1)
_WARMUP = 2


@dataclass(frozen=True)
class RunSpec:
    """A run: a model, the settings that differ from the defaults, and the lengths of a batch."""

    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (4096, 4096, 4096, 4096)
    layers: int | None = None


LLAMA, QWEN = "llama-3.1-8b", "qwen3-8b"
RUNS: dict[str, RunSpec] = {
    "8B, defaults": RunSpec(LLAMA),
    "8B, packed ragged lengths": RunSpec(LLAMA, lengths=_PACKED),
    "8B, rank 8": RunSpec(LLAMA, {"lora_rank": 8}),
    "8B, rank 64": RunSpec(LLAMA, {"lora_rank": 64}),
    "Qwen2.5-7B, bias": RunSpec("qwen2.5-7b"),
    "8B, dropout": RunSpec(LLAMA, {"lora_dropout": 0.05}),
    "8B, DoRA": RunSpec(LLAMA, {"use_dora": True}, (2048, 2048)),
    "8B, 8-bit head": RunSpec(LLAMA, {"head_precision": "8bit"}),
    "8B, inputs offloaded": RunSpec(
        LLAMA, {"offload": ("checkpoints",), "gradient_checkpointing": "full"}
    ),
    "8B, weights streamed": RunSpec(
        LLAMA, {"offload": ("weights",), "gradient_checkpointing": "full"}
    ),
    "mixture, 8 layers": RunSpec("qwen3-30b-a3b", layers=8),
    "Qwen3-Next, 4 layers": RunSpec("qwen3-next-80b-a3b", lengths=(4096, 2777, 1319), layers=4),
    "0.6B, every weight": RunSpec("qwen3-0.6b", {"method": "full"}, (4096, 4096)),
    "8B, deterministic": RunSpec(LLAMA, {"deterministic": True}),
}
"""By name, in the order of their worth."""


def shape_of(spec: RunSpec, small: bool) -> ModelConfig:
    """The model's shape, with as many layers as are measured."""
    shape = configuration(spec.model, small)
    return shape if small or spec.layers is None else shape.with_layers(spec.layers)


def measure_run(
    name: str, device: torch.device, dtype: torch.dtype, *, small: bool, steps: int
) -> dict[str, Any]:
    """Seconds, tokens per second and memory of a run's step, and the bytes that were planned."""
    clear(device)
    spec = RUNS[name]
    shape = shape_of(spec, small)
    lengths = _SMALL if small else spec.lengths
    given = {"gradient_checkpointing": "auto", **spec.changes}
    config = run_config(batch_size=len(lengths), max_length=max(*lengths, 8), **given)
    work = Workload((lengths,))
    policy, _ = planned_policy(shape, config, device, dtype, work)
    config = config.model_copy(update={"gradient_checkpointing": policy})
    cuda = device.type == "cuda"
    with deterministic(device, config.deterministic):
        step = build_step(shape, config, device, dtype, weights_on=device)
        batch, times = batch_of(shape, lengths), []
        for number in range(_WARMUP + steps):
            if number == _WARMUP and cuda:
                torch.cuda.reset_peak_memory_stats(device)
            synchronize(device)
            started = time.perf_counter()
            loss = step([batch], number).loss
            synchronize(device)
            times.append(time.perf_counter() - started)
    figures = summary(times[_WARMUP:], sum(lengths), 0.0, None, device)
    planned = plan(shape, config, gpu=cuda, dtype=dtype, work=work)
    expected = planned.step.bytes + planned.reserve.get("cuBLAS workspace", 0)
    real = figures["peak_memory_bytes"]
    return {
        "run": name,
        "policy": policy,
        "layers": shape.num_hidden_layers,
        **figures,
        "model_flops": planned.flops,
        "last_loss": loss,
        "planned_bytes": expected,
        "plan_error": None if real is None else expected / real - 1,
    }
