"""What processes that train together share: optimizer, progress, reasons to stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from engine.config.train_config import TrainConfig
from engine.distributed.group import Group
from engine.distributed.mesh import Mesh
from engine.distributed.messages import broadcast_text
from engine.distributed.optimizer_state import OptimizerOfRanks, OwnedState
from engine.errors import ConfigError
from engine.runs.checkpoints import CheckpointStore, LoadedCheckpoint
from engine.runs.metrics import StepMetrics
from engine.training.loop import Progress, StopReasons, new_progress
from engine.training.processes.divided_state import DividedStep
from engine.training.processes.ownership import PADDING, own_pieces, owned_by_all, sums_over
from engine.training.saving import Going, RunState, StoredState
from engine.training.step import StepRanks
from engine.training.trainable import (
    LEAST_8BIT,
    optimizer_over,
    piece_optimizer,
)
from kernels.adamw8bit import ROW
from kernels.runtime.ranks import host_maxima
from models.decoder import Decoder
from models.over_ranks import expert_parameters
from models.sharding import trained_pieces
from optim import StepOptimizer


@dataclass(frozen=True)
class Optimization:
    """The optimizer of this process, what adds gradients up, and what a checkpoint holds.

    Alone, `state` is the optimizer itself and `parallel` None.
    """

    optimizer: StepOptimizer
    state: StoredState
    parallel: StepRanks | None = None

    @classmethod
    def of(cls, model: Decoder, config: TrainConfig, mesh: Mesh) -> Optimization:
        """The optimizer of `config` over what this process updates of the model.

        Raises `ConfigError` where experts cannot be divided so with this optimizer.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if mesh.every.size == 1:
            optimizer = optimizer_over(trained.items(), config)
            return cls(optimizer, optimizer)
        if mesh.weights is not None and config.every_weight:
            optimizer = piece_optimizer(trained_pieces(model), config)
            return cls(optimizer, optimizer, DividedStep(model, mesh.data))
        experts = {id(p) for p in expert_parameters(model)}
        parallel = sums_over(model, config, mesh)
        share = 1 if mesh.experts is None else mesh.experts.size
        shares = dict.fromkeys(experts, share)
        if config.optimizer in ("adamw8bit", "lion8bit"):
            _check_blocks(trained, shares)
        pieces = own_pieces(model, parallel, mesh)
        optimizer = piece_optimizer(pieces, config)
        whole, numbers = _whole_optimizer(trained, shares, config)
        index = {id(p): numbers[name] for name, p in trained.items()}
        states = [
            [
                OwnedState(index[id(own.piece.parameter)], own.begin, own.piece.count, own.numel)
                for own in owned
            ]
            for owned in owned_by_all(parallel, mesh)
        ]
        order = {id(p): number for number, p in enumerate(optimizer.ordered_params())}
        mine = {
            numbers[one.name]: order[id(one.parameter)] for one in pieces if one.name != PADDING
        }
        state = OptimizerOfRanks(mesh.every, optimizer, whole, states, mine)
        return cls(optimizer, state, parallel)


def _whole_optimizer(
    trained: Mapping[str, nn.Parameter], shares: Mapping[int, int], config: TrainConfig
) -> tuple[StepOptimizer, dict[str, int]]:
    """An optimizer as one process has it, over stand-ins in host memory, and their numbers.

    `shares` says how many processes divide a parameter; the numbers are by the parameters' names.
    """
    stand_ins: dict[str, nn.Parameter] = {}
    for name, p in trained.items():
        first, *others = p.shape
        shape = (shares.get(id(p), 1) * first, *others)
        stand_ins[name] = nn.Parameter(torch.empty(shape, dtype=p.dtype, device="cpu"))
    # The names decide the groups, and so the order of the whole state.
    whole = optimizer_over(stand_ins.items(), config)
    order = {id(p): number for number, p in enumerate(whole.ordered_params())}
    return whole, {name: order[id(p)] for name, p in stand_ins.items()}


def _check_blocks(trained: Mapping[str, nn.Parameter], shares: Mapping[int, int]) -> None:
    """Raises `ConfigError` where blocks of 8-bit states hold experts of two processes."""
    for name, p in trained.items():
        if shares.get(id(p), 0) * p.numel() >= LEAST_8BIT and p.numel() % ROW:
            raise ConfigError(
                f"A process has {p.shape[0]} experts of {name}, {p.numel()} elements, and 8-bit "
                f"states of the optimizer are of {ROW} each: some would be of two processes. Give "
                "--optimizer adamw, a --lora-rank that is a multiple of 8, or a smaller "
                "--expert-parallel."
            )


def resumed_together(
    state: RunState, checkpoints: CheckpointStore | None, going: Going, group: Group
) -> tuple[Progress, Going]:
    """Where the run goes on, and how; the first process reads the checkpoint for all."""
    loaded: LoadedCheckpoint | None = None
    if group.leads:
        progress = new_progress(state.model)
        if checkpoints is not None:
            progress, going, loaded = state.resume(checkpoints, going)
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
        state.share(group, loaded)
        if state.average is not None:
            state.average.updates = facts["averaged"]
        if isinstance(state.optimizer, OptimizerOfRanks):
            state.optimizer.spread()
    return progress, going


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
