"""What processes that train together share: optimizer, progress, reasons to stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel, JoinedParallel
from engine.distributed.group import Group
from engine.distributed.mesh import Mesh
from engine.distributed.messages import broadcast_text
from engine.distributed.optimizer_state import OptimizerOfRanks, OwnedState
from engine.errors import ConfigError
from engine.runs.checkpoints import CheckpointStore, LoadedCheckpoint
from engine.runs.metrics import StepMetrics
from engine.training.loop import Progress, StopReasons, new_progress
from engine.training.processes.divided_state import DividedStep
from engine.training.saving import Going, RunState, StoredState
from engine.training.step import StepRanks
from engine.training.trainable import (
    LEAST_8BIT,
    backward_units,
    least_8bit,
    optimizer_of,
    optimizer_over,
)
from kernels.adamw8bit import ROW
from kernels.runtime.ranks import host_maxima
from models.decoder import Decoder
from models.over_ranks import expert_parameters
from models.sharding import trained_pieces
from optim import StepOptimizer
from optim.param_groups import piece_groups


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

        Raises `ConfigError` where a process would have nothing to update, or where experts cannot
        be divided so with this optimizer.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if mesh.every.size == 1:
            optimizer = optimizer_over(trained.items(), config)
            return cls(optimizer, optimizer)
        if mesh.weights is not None and config.every_weight:
            groups = piece_groups(trained_pieces(model), config.weight_decay, least_8bit(config))
            optimizer = optimizer_of(groups, config)
            return cls(optimizer, optimizer, DividedStep(model, mesh.data))
        experts = {id(p) for p in expert_parameters(model)}
        try:
            parallel = _parallel(backward_units(model), experts, mesh)
        except ValueError as error:
            raise ConfigError(f"{error}. Start fewer processes.") from error
        owned = _owners(parallel, mesh)
        mine = owned[mesh.every.rank]
        own = {n: p for n, p in trained.items() if id(p) in mine}
        if not own:
            raise ConfigError(
                f"{len(trained)} trained tensors are too few for {mesh.every.size} processes: rank "
                f"{mesh.every.rank} would have none to update. Start fewer processes."
            )
        share = 1 if mesh.experts is None else mesh.experts.size
        sizes = {id(p): share * p.numel() for p in trained.values() if id(p) in experts}
        if config.optimizer in ("adamw8bit", "lion8bit"):
            _check_blocks(trained, sizes)
        optimizer = optimizer_over(own.items(), config, sizes)
        whole, real = _whole_optimizer(trained, dict.fromkeys(experts, share), config)
        numbers = {real[id(p)]: number for number, p in enumerate(optimizer.ordered_params())}
        states = [
            [OwnedState(index, *each[p]) for p, index in real.items() if p in each]
            for each in owned
        ]
        state = OptimizerOfRanks(mesh.every, optimizer, whole, states, numbers)
        return cls(optimizer, state, parallel)


def _whole_optimizer(
    trained: Mapping[str, nn.Parameter], shares: Mapping[int, int], config: TrainConfig
) -> tuple[StepOptimizer, dict[int, int]]:
    """An optimizer as one process has it, over stand-ins in host memory, and their numbers.

    `shares` says how many processes divide a parameter; the numbers are by the parameters' `id`.
    """
    stands_for: dict[int, nn.Parameter] = {}
    stand_ins: dict[str, nn.Parameter] = {}
    for name, p in trained.items():
        first, *others = p.shape
        shape = (shares.get(id(p), 1) * first, *others)
        stand_in = nn.Parameter(torch.empty(shape, dtype=p.dtype, device="cpu"))
        stand_ins[name], stands_for[id(stand_in)] = stand_in, p
    # The names decide the groups, and so the order of the whole state.
    whole = optimizer_over(stand_ins.items(), config)
    return whole, {id(stands_for[id(p)]): i for i, p in enumerate(whole.ordered_params())}


def _parallel(units: list[list[Tensor]], experts: set[int], mesh: Mesh) -> JoinedParallel:
    """What adds gradients up: over all processes, of experts over those that have the same ones."""
    others = [[p for p in unit if id(p) not in experts] for unit in units]
    sets = [DataParallel(mesh.every, others, data=mesh.data, spare=bool(experts))]
    if experts:
        own = [[p for p in unit if id(p) in experts] for unit in units]
        sets.append(DataParallel(mesh.replicas, own, spare=True))
    return JoinedParallel(*sets)


def _owners(parallel: JoinedParallel, mesh: Mesh) -> list[dict[int, tuple[int, int]]]:
    """What each process updates: a parameter's `id` -> which part it has, of how many."""
    every, *experts = parallel.sets
    share = 1 if mesh.experts is None else mesh.experts.size
    owned: list[dict[int, tuple[int, int]]] = []
    for rank in range(mesh.every.size):
        replica, part = divmod(rank, share)
        owned.append(dict.fromkeys(every.owned_by(rank), (0, 1)))
        for divided in experts:
            owned[-1] |= dict.fromkeys(divided.owned_by(replica), (part, share))
    return owned


def _check_blocks(trained: Mapping[str, nn.Parameter], sizes: Mapping[int, int]) -> None:
    """Raises `ConfigError` where blocks of 8-bit states hold experts of two processes."""
    for name, p in trained.items():
        if sizes.get(id(p), 0) >= LEAST_8BIT and p.numel() % ROW:
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
