"""What a rank of several holds throughout a step: buckets, gradients, states."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config.train_config import TrainConfig
from engine.memory.simulate.device import GPU, OnGPU, OnHost
from engine.memory.simulate.observer import observed, track_parallel
from engine.memory.simulate.ranks import Measure, SimulatedMesh, fullest_rank, own_optimizer
from engine.memory.simulate.simulated_meter import META, SimulatedMeter
from engine.memory.simulate.step import OF_A_RANK, assumed_gpu, make_tables
from engine.training.trainable import make_optimizer, make_trainable
from kernels.runtime.simulation import simulate_with
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.over_ranks import divide_experts


@dataclass(frozen=True)
class RankMemory:
    """Bytes by owner of a rank that has most, and what a step of it gives to collectives.

    `whole_state` is the optimizer's state of all ranks, which a checkpoint brings to each one's
    host memory. `tensors` counts those that are trained.
    """

    owners: dict[str, int]
    sent: dict[str, int]
    whole_state: int
    tensors: int


def rank_memory(
    model: ModelConfig, config: TrainConfig, measure: Measure, *, gpu: bool, dtype: torch.dtype
) -> RankMemory:
    """What `processes_of(config)` ranks hold of the whole model's trained parameters.

    They are those of the rank that has most by `measure`.
    """
    groups = SimulatedMesh.of(config)
    meter = SimulatedMeter(assumed_gpu(config) if gpu else None)
    device = GPU if gpu else META
    with simulate_with(meter), observed(meter, fresh_scratch=True), OnGPU() if gpu else OnHost():
        make_tables(device)
        with meter, torch.device("meta"):
            graph = Decoder(model).to(dtype)
            if groups.mesh.experts is not None:
                divide_experts(graph, groups.mesh.experts)
            make_trainable(graph, config, None)
            mesh, parallel = fullest_rank(graph, config, groups, measure)
            sent = parallel.bytes_per_step()
            track_parallel(meter, parallel)
            own = own_optimizer(graph, config, mesh, parallel)
            own.state_tensors()
            owners = {owner: meter.live[owner] for owner in OF_A_RANK}
            whole = make_optimizer(graph, config)
            whole.state_tensors()
            whole_state = meter.live["optimiser"] - owners["optimiser"]
    count = sum(1 for p in graph.parameters() if p.requires_grad)
    return RankMemory(owners, sent, whole_state, count)
