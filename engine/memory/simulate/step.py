"""Simulate a training step: run the training code on tensors without memory.

The model is loaded, adapted and trained for one step on torch's meta tensors in place of weights
and activations, under a `SimulatedMeter`. Token ids, targets and document boundaries are real, so
what depends on them (chunks of the loss, documents, positions) is as in a real step.

For a CPU the code for CPUs runs, and the bytes are those of a real step. For a CUDA GPU meta
tensors claim to lie on one, so the code for GPUs runs: Triton kernels are not launched, but what
their callers allocate is counted; storages are rounded up to the caching allocator's 512 bytes;
attention is torch's flash attention, whose backward holds an fp32 dQ.

Tensors are meta tensors, not torch's fake ones. Autograd runs their backward in the calling thread
on every build of torch, so the context variables of `kernels.runtime` and torch's modes, which
belong to a thread, hold in backward too, and other threads see nothing of a simulation. Fake
tensors that say cuda want a build with CUDA for that, and take seven times as long for an op.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import cast

import torch

import kernels.attention.cpu
import kernels.nf4.decode
import kernels.nf4.encode
import kernels.nf4.matmul
from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import JoinedParallel
from engine.memory.simulate.answers import planned_objective
from engine.memory.simulate.device import ASSUMED_GPU, GPU, OnGPU, OnHost
from engine.memory.simulate.meter import SCRATCH, Peak, Segment
from engine.memory.simulate.observer import observed, track_model, track_parallel
from engine.memory.simulate.ranks import (
    Measure,
    SimulatedDivision,
    SimulatedMesh,
    SimulatedRanks,
    fullest_rank,
    own_optimizer,
)
from engine.memory.simulate.simulated_meter import META, SimulatedMeter
from engine.memory.simulate.stored_model import EmptySource
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_for
from engine.runs.startup import importing
from engine.training.step import StepRanks, TrainingStep
from engine.training.trainable import (
    make_average,
    make_in_backward,
    make_optimizer,
    make_trainable,
    piece_optimizer,
    step_settings,
)
from kernels.adamw8bit.dynamic_map import dynamic_map, grid_table, magnitude_tables, midpoints
from kernels.moe.grouped_library import hopper_here
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime.scratch import scratch
from kernels.runtime.simulation import SimulatedGPU, simulate_with
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from models.memory.offload import quantized_weights
from models.memory.sharded_weights import ShardedWeights
from models.over_ranks import split_context
from models.sharding import trained_pieces
from models.tensor_layout import Layout
from optim import StepOptimizer

OF_A_RANK = ("trained weights", "gradients", "optimiser")
"""What a rank of several holds all the time. It does not grow evenly with the layers, so it is left
out of a simulated step (`engine.memory.simulate.rank_memory` counts it)."""


@dataclass(frozen=True)
class SimulatedStep:
    """Peaks of one simulated step. `resident` is what stays between steps, by owner.

    `host` is the most bytes that were put into the host's memory to spare a GPU's. Of several
    processes this one gives `passes` bytes to each kind of collective in these passes, and `steps`
    once a step, without what data parallelism exchanges of gradients and parameters.
    """

    load: Peak
    segments: dict[Segment, Peak]
    resident: dict[str, int]
    trainable: int
    flops: float
    host: int = 0
    passes: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def step(self) -> Peak:
        """The highest peak of the step."""
        return max(self.segments.values(), key=lambda peak: peak.bytes)

    def with_more(self, owner: str, times: int) -> SimulatedStep:
        """The same step with `times` what lasts of an owner's bytes."""
        extra = (times - 1) * self.resident[owner]

        def raised(peak: Peak) -> Peak:
            owners = peak.owners | {owner: peak.owners[owner] + extra}
            return Peak(peak.bytes + extra, owners)

        segments = {name: raised(peak) for name, peak in self.segments.items()}
        resident = self.resident | {owner: self.resident[owner] + extra}
        return replace(self, segments=segments, resident=resident)

    def with_lasting(self, lasting: dict[str, int]) -> SimulatedStep:
        """The same step where these owners hold so many bytes from its start to its end."""

        def changed(peak: Peak) -> Peak:
            owners = peak.owners | lasting
            return Peak(sum(owners.values()), owners)

        segments = {name: changed(peak) for name, peak in self.segments.items()}
        return replace(self, segments=segments, resident=self.resident | lasting)


def simulate_step(
    model_config: ModelConfig,
    config: TrainConfig,
    batches: Sequence[PackedBatch],
    measure: Measure = "state",
    *,
    gpu: bool,
    dtype: torch.dtype,
    stored: torch.dtype = torch.bfloat16,
) -> SimulatedStep:
    """Load, adapt and train one step of `batches` without memory.

    `gpu` chooses the code for CUDA. Of several processes it is the step of the one that has most,
    by `measure`. Raises what the run itself would raise for these settings.
    """
    kernels.attention.cpu.flash_reads_groups()
    # torch imports its compiler at the first meta op, whose frames would keep tensors alive.
    with importing():
        importlib.import_module("torch._dynamo")
    groups = SimulatedMesh.of(config)
    meter = SimulatedMeter(assumed_gpu(config) if gpu else None)
    device = GPU if gpu else META
    with simulate_with(meter), observed(meter, fresh_scratch=True), OnGPU() if gpu else OnHost():
        make_tables(device)
        with meter:
            meter.begin("load")
            source = cast(
                ModelSource,
                EmptySource(model_config, stored, meter, _resized(model_config, config)),
            )
            mesh = groups.mesh
            model = build_for(config, source, device, dtype, mesh.weights, mesh.experts)
            return _trained(meter, model, config, batches, (groups, measure))


def _resized(model: ModelConfig, config: TrainConfig) -> tuple[str, ...]:
    """The tensors that get rows for new tokens as they are read."""
    embedding = Layout(model.nested).path("model.embed_tokens.weight")
    return () if config.add_tokens is None else (embedding, "lm_head.weight")


def assumed_gpu(config: TrainConfig) -> SimulatedGPU:
    return replace(ASSUMED_GPU, repeats=config.deterministic, multiplies_groups=hopper_here())


def make_tables(device: torch.device) -> None:
    """The small tables that are made once per process and device belong to no step."""
    for signed in (True, False):
        dynamic_map(signed, device)
        midpoints(signed, device)
        grid_table(signed, device)
        magnitude_tables(signed, device)
    kernels.nf4.encode._thresholds(device)
    kernels.nf4.encode._cells(device)
    kernels.nf4.matmul._counters(device)
    kernels.nf4.decode._pair_table(device)


def _trained(
    meter: SimulatedMeter,
    model: Decoder,
    config: TrainConfig,
    batches: Sequence[PackedBatch],
    rank: tuple[SimulatedMesh, Measure],
) -> SimulatedStep:
    """Adapt the model that is loaded, and train it for one step."""
    load = meter.peak
    meter.begin("adapters and states")  # which every step has too
    meter.hand_over(meter.owner, "norms and biases")
    with torch.device("meta"):
        trainable = make_trainable(model, config, None)
    groups, measure = rank
    if groups.mesh.context.size > 1:
        split_context(model, groups.mesh.context)
    optimizer, parallel = _optimization(model, config, groups, measure)
    track_model(meter, model)
    track_parallel(meter, parallel)
    average = make_average(model, config)
    if average is not None:
        meter.track("moving average", average.state_tensors().values())
    owns = isinstance(parallel, JoinedParallel)
    if owns:
        meter.aside = (*SCRATCH, *OF_A_RANK)
    if meter.gpu is not None:
        _reserve_partial_sums(model, meter.gpu)
    step = TrainingStep(
        model,
        optimizer,
        step_settings(config),
        config.max_grad_norm,
        objective=planned_objective(config, batches),
        in_backward=make_in_backward(model, optimizer, config),
        parallel=parallel,
    )
    _step(meter, step, batches, groups)
    del step  # what it leaves until the next one, such as norms, is no lasting memory
    if average is not None:
        average.update()
    resident = dict(meter.live)
    if owns:
        resident |= dict.fromkeys(OF_A_RANK, 0)
    steady = _steady(meter.segments, resident, meter.aside)
    if isinstance(parallel, JoinedParallel) and isinstance(parallel.ranks, SimulatedRanks):
        groups.steps["all_reduce"] += parallel.ranks.sent["all_reduce"]
    sent = dict(groups.passes), dict(groups.steps)
    return SimulatedStep(load, steady, resident, trainable, meter.flops, meter.host_high, *sent)


def _reserve_partial_sums(model: Decoder, gpu: SimulatedGPU) -> None:
    """The scratch that a step of few tokens leaves, of which every run may have one."""
    shapes = {
        (int(weight.shape[0]), int(weight.shape[1]))
        for module in model.modules()
        for weight in quantized_weights(module).values()
        if isinstance(weight, PlanarNF4Weight) and len(weight.shape) == 2
    }
    most = max((_partial_sums(gpu, shape) for shape in shapes), default=0)
    if most:
        scratch("nf4 partial sums", (most,), torch.float32, GPU)


@cache
def _partial_sums(gpu: SimulatedGPU, shape: tuple[int, int]) -> int:
    return kernels.nf4.matmul.most_partial_sums(gpu.architecture, gpu.multiprocessors, *shape)


def _optimization(
    model: Decoder, config: TrainConfig, groups: SimulatedMesh, measure: Measure
) -> tuple[StepOptimizer, StepRanks | None]:
    """The run's optimizer; of several processes that of the one with most by `measure`."""
    if groups.mesh.every.size == 1:
        return make_optimizer(model, config), None
    if groups.mesh.weights is not None and config.every_weight:
        return piece_optimizer(trained_pieces(model), config), SimulatedDivision(model, groups)
    mesh, parallel = fullest_rank(model, config, groups, measure)
    return own_optimizer(model, config, mesh, parallel), parallel


def _step(
    meter: SimulatedMeter,
    step: TrainingStep,
    batches: Sequence[PackedBatch],
    groups: SimulatedMesh,
) -> None:
    """One step, with the optimizer's state there from the start as in every later step."""
    tensors = [t for b in batches for t in b.tensors()]
    if meter.gpu is None:
        meter.track("batch", tensors)
    else:  # which is sent as one, and stays in the host's memory besides
        with meter.shapes_only():
            joined = [b.joined() for b in batches]
        meter.track("batch", joined)
        meter.ignore(tensors)
    step.optimizer.state_tensors()
    stream = step.model.weight_stream
    if isinstance(stream, ShardedWeights):  # a step before has left two layers in the buffers
        stream.idle_forward()
        stream.idle_backward()
    groups.passes.clear()
    meter.segments.clear()
    step(batches)


def _steady(
    segments: dict[Segment, Peak], resident: dict[str, int], lasting: Sequence[str]
) -> dict[Segment, Peak]:
    """The peaks of a later step: scratch that a step leaves is there from the next one's start.

    So is all else that is `lasting`.
    """
    steady = {}
    for name, peak in segments.items():
        owners = peak.owners | {owner: resident[owner] for owner in lasting}
        steady[name] = Peak(sum(owners.values()), owners)
    return steady
