"""Whole QLoRA steps on random weights: speed, memory, utilisation.

Every token is trained, the documents are equally long, and LoRA of rank 16 is on all projections.
Model FLOPs count what the mathematics needs and no recomputation: per token 4 per weight of the
seven projections (forward and the gradient of the input), 4 per weight of the head, 6 per adapter
weight, and 3.5 times causal attention's forward pass.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from engine.benchmark.cases.elementwise import adapter_shapes
from engine.benchmark.cases.layer import linear_parameters
from engine.benchmark.cases.matmul import attention_flops
from engine.benchmark.cases.random_weights import random_decoder
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.timing import clear, synchronize
from engine.training.step import TrainingStep
from models.config.model_config import ModelConfig
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.memory.cuda_graphs import LayerGraphs
from models.memory.recorder import CudaRecorder
from optim import AdamW8bit

RANK = 16


@dataclass(frozen=True)
class StepSpec:
    """A step: `documents` of `length` tokens each, at one checkpointing policy.

    With `graphs` the layers' launches are recorded once and repeated (`models.memory.cuda_graphs`).
    """

    model: str
    documents: int
    length: int
    policy: str
    graphs: bool = False

    @classmethod
    def parse(cls, text: str) -> StepSpec:
        """From `model documents x length policy [graphs]`, the form that `str` gives."""
        model, size, policy, *graphs = text.split()
        documents, length = size.split("x")
        return cls(model, int(documents), int(length), policy, graphs == ["graphs"])

    def __str__(self) -> str:
        plain = f"{self.model} {self.documents}x{self.length} {self.policy}"
        return f"{plain} graphs" if self.graphs else plain

    @property
    def tokens(self) -> int:
        return self.documents * self.length


def random_batch(config: ModelConfig, spec: StepSpec, device: torch.device) -> PackedBatch:
    """Random tokens, all of them trained but the first of each document."""
    ids = torch.randint(0, config.vocab_size, (spec.documents, spec.length), device=device)
    return PackedBatch.of(ids, ids)


def model_flops(config: ModelConfig, spec: StepSpec) -> float:
    """Operations of one step without recomputation; see the module's docstring."""
    layers = config.num_hidden_layers
    adapter = sum(a * b for a, b in adapter_shapes(config, RANK, layers))
    head = config.vocab_size * config.hidden_size
    bounds = range(0, spec.tokens + 1, spec.length)
    attention = layers * attention_flops(config, bounds)
    dense = 4.0 * (layers * linear_parameters(config) + head) + 6.0 * adapter
    return spec.tokens * dense + 3.5 * attention


def build(
    config: ModelConfig, spec: StepSpec, device: torch.device, dtype: torch.dtype
) -> TrainingStep:
    """The trainer's own step on a random model, at the step's checkpointing policy."""
    model = random_decoder(config, device, dtype, rank=RANK)
    if spec.graphs:
        # Without a GPU the same passes run launch by launch.
        recorder = CudaRecorder(device) if device.type == "cuda" else None
        model.set_graphs(LayerGraphs(model.layers, recorder))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    policy = StepSettings(checkpointing=spec.policy)
    return TrainingStep(model, AdamW8bit(trained, lr=1e-4), policy, max_grad_norm=1.0)


def measure_step(
    spec: StepSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    small: bool = False,
    steps: int = 5,
    peak_flops: float | None = None,
) -> dict[str, Any]:
    """Median step time, tokens per second, share of `peak_flops`, peak memory."""
    clear(device)
    config = configuration(spec.model, small)
    step = build(config, spec, device, dtype)
    batch = random_batch(config, spec, device)
    warmup = 2
    times, losses = [], []
    for number in range(warmup + steps):
        if number == warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        losses.append(step([batch], number).loss)
        synchronize(device)
        times.append(time.perf_counter() - started)
    timed = times[warmup:]
    if not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"losses are not finite: {losses}")
    return {
        **asdict(spec),
        **summary(timed, spec.tokens, model_flops(config, spec), peak_flops, device),
        "first_step_seconds": times[0],
        "losses": losses,
    }


def compare_graphs(
    spec: StepSpec, device: torch.device, dtype: torch.dtype, *, small: bool, steps: int
) -> dict[str, Any]:
    """The step launch by launch, and from recorded launches: times, memory, losses apart."""
    rows = {}
    for name, graphs in (("launched", False), ("recorded", True)):
        torch.manual_seed(0)
        given = replace(spec, graphs=graphs)
        rows[name] = measure_step(given, device, dtype, small=small, steps=steps)
    launched, recorded = rows["launched"], rows["recorded"]
    pairs = zip(launched["losses"], recorded["losses"], strict=True)
    apart = max(abs(a - b) / abs(a) for a, b in pairs)
    speedup = launched["seconds"] / recorded["seconds"]
    return {**rows, "speedup": speedup, "losses_apart": apart, "passed": apart <= _LOSSES_APART}


_LOSSES_APART = 1e-2
"""Relative: attention's gradient adds up in no fixed order on a GPU, in 16 bit."""


def summary(
    timed: list[float],
    tokens: int,
    flops: float,
    peak_flops: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """What both sides report of their timed steps."""
    seconds = statistics.median(timed)
    cuda = device.type == "cuda"
    return {
        "seconds": seconds,
        "all_seconds": timed,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "model_flops": flops,
        "utilisation": None if peak_flops is None else flops / seconds / peak_flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }
