"""What processes that train together share: optimizer, progress, reasons to stop."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel
from engine.distributed.group import Group
from engine.distributed.mesh import Mesh
from engine.distributed.messages import broadcast_tensors, broadcast_text
from engine.distributed.optimizer_state import OptimizerOfRanks
from engine.runs.checkpoints import CheckpointStore
from engine.runs.metrics import StepMetrics
from engine.training.loop import Progress, StopReasons, new_progress
from engine.training.saving import Going, RunState, StoredState
from engine.training.trainable import backward_units, optimizer_over
from kernels.runtime.ranks import host_maxima
from models.decoder import Decoder
from optim import StepOptimizer


@dataclass(frozen=True)
class Optimization:
    """The optimizer of this process, what adds gradients up, and what a checkpoint holds.

    Alone, `state` is the optimizer itself and `parallel` None.
    """

    optimizer: StepOptimizer
    state: StoredState
    parallel: DataParallel | None = None

    @classmethod
    def of(cls, model: Decoder, config: TrainConfig, mesh: Mesh) -> Optimization:
        """The optimizer of `config` over what this process updates of the model."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if mesh.every.size == 1:
            optimizer = optimizer_over(trained.items(), config)
            return cls(optimizer, optimizer)
        parallel = DataParallel(mesh.every, backward_units(model), data=mesh.data)
        own = {n: p for n, p in trained.items() if id(p) in parallel.owned}
        optimizer = optimizer_over(own.items(), config)
        # The names decide the groups, and so the order of the whole state.
        stands_for: dict[int, Tensor] = {}
        stand_ins: dict[str, nn.Parameter] = {}
        for name, p in trained.items():
            stand_in = nn.Parameter(torch.empty_like(p, device="cpu"))
            stand_ins[name], stands_for[id(stand_in)] = stand_in, p
        whole = optimizer_over(stand_ins.items(), config)
        real = [stands_for[id(stand_in)] for stand_in in whole.ordered_params()]
        return cls(optimizer, OptimizerOfRanks(parallel, optimizer, whole, real), parallel)


def resumed_together(
    state: RunState, checkpoints: CheckpointStore | None, going: Going, group: Group
) -> tuple[Progress, Going]:
    """Where the run goes on, and how; the first process reads the checkpoint for all."""
    if group.is_alone or group.leads:
        progress = new_progress(state.model)
        if checkpoints is not None:
            progress, going = state.resume(checkpoints, going)
    if group.is_alone:
        return progress, going
    told = ""
    if group.leads:
        how = {"policy": going.policy, "warmup_steps": going.warmup_steps}
        averaged = 0 if state.average is None else state.average.updates
        facts = {"progress": progress.state(), "going": how, "averaged": averaged}
        told = json.dumps(facts)
    facts = json.loads(broadcast_text(group.ranks, told))
    progress, going = Progress(**facts["progress"]), Going(**facts["going"])
    if progress.step > 0:
        share_weights(state, group)
        if state.average is not None:
            state.average.updates = facts["averaged"]
        assert isinstance(state.optimizer, OptimizerOfRanks)
        state.optimizer.spread()
    return progress, going


def share_weights(state: RunState, group: Group) -> None:
    """Give every process the trained weights of the first, and their average."""
    averages = {} if state.average is None else state.average.state_tensors()
    broadcast_tensors(group.ranks, [*state.weights().values(), *averages.values()])


def agreed(group: Group, own: StopReasons) -> StopReasons:
    """The reasons to stop of all processes, this one's own text first."""
    if group.is_alone:
        return own
    number, ended, problem = host_maxima(
        group.ranks, own.signal or 0, float(own.ended), float(own.problem is not None)
    )
    text = own.problem
    if problem and text is None:
        text = "Another process of the run took more memory than it may; its output says how much."
    return StopReasons(int(number) or None, bool(ended), text)


def over_ranks(group: Group, line: StepMetrics) -> StepMetrics:
    """A step's line with the most memory that any process took."""
    (peak,) = host_maxima(group.ranks, line.peak_memory_bytes or 0)
    return line if group.is_alone else replace(line, peak_memory_bytes=int(peak))
