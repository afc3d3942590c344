"""The plan of one rank of several: what it holds, byte for byte, and its largest pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel, JoinedParallel
from engine.distributed.deal import PassLimits, deal_by_cost, deal_in_order
from engine.distributed.dealing import cost_of
from engine.distributed.mesh import Mesh, MeshSizes
from engine.memory.auto_policy import planned_policy
from engine.memory.estimate import MemoryPlan, Simulations, make_batch, plan, step_of, workload
from engine.memory.search import changed
from engine.memory.simulate.answers import planned_objective
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed, track_model, track_parallel
from engine.model_sources.load_model import build_for
from engine.training.processes.together import Optimization
from engine.training.step import StepRanks, TrainingStep
from engine.training.trainable import make_average, make_trainable, step_settings
from kernels.runtime.ranks import ONE_RANK, Transfer
from models.config.model_config import ModelConfig
from models.over_ranks import split_context
from tests.support.processes.rank_threads import ThreadRanks, run_on_mesh
from tests.support.tiny_model import RandomSource

SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
MIXTURE = SMALL | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 4,  # every expert is sent as many rows, whatever the router says
    "moe_intermediate_size": 128,
    "tie_word_embeddings": False,
}
DIVIDED = {"shard": "weights"}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "two passes": {"accumulate": 2, "lora_rank": 64, "optimizer": "adamw"},
    "all weights": {"method": "full"},
    "whole matrices": {"optimizer": "adafactor", "lora_rank": 64},
    "muon": {"method": "full", "optimizer": "muon"},
    "divided base": DIVIDED,
    "divided dense base": DIVIDED | {"method": "lora"},
    "divided training": DIVIDED | {"method": "full"},
    "divided training, two passes": DIVIDED | {"method": "full", "accumulate": 2},
    "averaged divided training": DIVIDED | {"method": "full", "ema_decay": 0.9},
    "divided preferences": DIVIDED | {"method": "full", "objective": "orpo"},
    "context": {"context_parallel": 2, "gradient_checkpointing": "none"},
    "context of a divided base": DIVIDED | {"context_parallel": 2, "accumulate": 2},
    "context of divided training": DIVIDED | {"context_parallel": 2, "method": "full"},
}
"""Ways to train together, of a dense model."""
MIXED: dict[str, dict[str, Any]] = {
    "experts": {"expert_parallel": 2},
    "averaged experts in two passes": {
        "expert_parallel": 2,
        "accumulate": 2,
        "method": "lora",
        "ema_decay": 0.9,
    },
    "experts and a divided base": DIVIDED | {"expert_parallel": 2},
    "experts and context": {"expert_parallel": 2, "context_parallel": 2},
    "everything": DIVIDED | {"expert_parallel": 2, "context_parallel": 2},
    "divided training of experts": DIVIDED | {"method": "full"},
}
"""Ways to train a mixture together."""


def settings(**changes: Any) -> TrainConfig:
    common = {"gradient_checkpointing": "selective", "lora_dropout": 0.0}
    return TrainConfig(model="m", data="d", device="cpu", **common | changes)


class UnseenRanks(ThreadRanks):
    """A thread's collectives, whose copies are no memory of the rank's."""

    def _all(self, kind: str, x: Tensor) -> list[Tensor]:
        with _disable_current_modes():
            return super()._all(kind, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        with _disable_current_modes():
            return super().reduce_scatter(out, x)

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        with _disable_current_modes():
            return super().all_gather(out, x)

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        with _disable_current_modes():
            return super().all_to_all(out, x, received, sent)


def second_step(mesh: Mesh, raw: dict[str, Any], config: TrainConfig) -> tuple[int, dict[str, int]]:
    """The most bytes of a rank's second real step, and what it gave to each kind of collective."""
    source: Any = RandomSource(ModelConfig.from_dict(raw))
    divided = mesh.weights, mesh.experts
    model = build_for(config, source, torch.device("cpu"), torch.float32, *divided)
    make_trainable(model, config, None)
    if mesh.context.size > 1:
        split_context(model, mesh.context)
    optimization = Optimization.of(model, config, mesh)
    batches = [make_batch([100, 37, 163], config)] * config.accumulate
    meter = MemoryMeter()
    track_model(meter, model)
    track_parallel(meter, optimization.parallel)
    meter.track("batch", [t for b in batches for t in b.tensors()])
    meter.track("optimiser", optimization.optimizer.state_tensors().values())
    average = make_average(model, config)
    if average is not None:
        meter.track("moving average", average.state_tensors().values())
    step = TrainingStep(
        model,
        optimization.optimizer,
        step_settings(config),
        config.max_grad_norm,
        objective=planned_objective(config, batches),
        parallel=optimization.parallel,
        average=average,
    )
    groups = {id(g): g for g in (mesh.every, mesh.data, mesh.context, mesh.experts, mesh.replicas)}
    sent = [g.sent for g in groups.values() if isinstance(g, ThreadRanks)]
    with observed(meter, fresh_scratch=True), meter:
        step(batches)
        meter.segments.clear()
        for counter in sent:
            counter.clear()
        meter.begin("start")
        step(batches, 1)
    return meter.peak.bytes, dict(sum(sent, Counter()))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*MODES, *MIXED])
def test_a_rank_takes_and_sends_what_was_planned(name: str, size: int) -> None:
    raw, changes = (SMALL, MODES[name]) if name in MODES else (MIXTURE, MIXED[name])
    config = settings(**changes)
    sizes = MeshSizes(config.context_parallel, config.expert_parallel, config.shard == "weights")
    told = run_on_mesh(size, sizes, lambda mesh: second_step(mesh, raw, config), UnseenRanks)
    model = ModelConfig.from_dict(raw)
    batches = [make_batch([100, 37, 163], config)] * config.accumulate
    together = changed(config, gpus=size)
    made = plan(model, together, gpu=False, dtype=torch.float32, work=batches)
    assert made.step.bytes == pytest.approx(max(peak for peak, _ in told), rel=0.01)
    assert made.sent == told[0][1]


def test_what_sums_gradients_over_several_sets_is_counted_whole() -> None:
    """A run has its sets joined, also where there is one."""
    tensors = [torch.nn.Parameter(torch.zeros(64)) for _ in range(3)]
    sets = [DataParallel(ONE_RANK, [tensors[:2]]), DataParallel(ONE_RANK, [tensors[2:]])]

    def counted(*given: StepRanks) -> int:
        meter = MemoryMeter()
        for one in given:
            track_parallel(meter, one)
        return sum(meter.live.values())

    assert counted(JoinedParallel(*sets)) == counted(*sets) > 0


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=14),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["by cost", "in order", "packed"]),
)
@example([100, 37, 163, 20], 2, 2, 1, "by cost")
def test_no_pass_of_a_rank_is_larger_than_what_is_planned(
    lengths: list[int], batch: int, accumulate: int, ranks: int, how: str
) -> None:
    model = ModelConfig.from_dict(SMALL)
    config = settings(
        batch_size=batch,
        accumulate=accumulate,
        max_length=300,
        packing=how == "packed",
        lora_dropout=0.1 if how == "in order" else 0.0,
    )
    # Of one rank that rows are dealt to, others have the same rows.
    shared = 2 if ranks == 1 else 1
    together = changed(config, gpus=shared * ranks, context_parallel=shared)
    planned = step_of(together, lengths, model)
    cost, size = cost_of(model), lengths.__getitem__
    rows = list(range(len(lengths)))[: batch * accumulate]
    step = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    if how == "in order":
        dealt = deal_in_order(step, size, cost, ranks)
    else:
        tokens = 300 * batch if config.packing else None
        dealt = deal_by_cost(step, size, cost, ranks, PassLimits(batch, tokens))
    most = max(sum(map(size, piece.rows)) for pieces in dealt for piece in pieces)
    if how == "packed" and sum(lengths) > 300 * batch * accumulate:
        return  # more documents than a packed step holds
    assert most <= planned.tokens


def test_rows_of_one_length_are_planned_as_they_are_dealt() -> None:
    model, config = ModelConfig.from_dict(SMALL), settings(batch_size=4, accumulate=2)
    rows = {n: workload(changed(config, gpus=n), model).micro_batches for n in (2, 3, 4, 8, 16)}
    length = config.max_length
    assert rows == {n: ((length,) * each,) for n, each in ((2, 4), (3, 3), (4, 2), (8, 1), (16, 1))}
    made: list[MemoryPlan] = [
        plan(model, changed(config, gpus=n), gpu=True, dtype=torch.bfloat16) for n in (2, 4)
    ]
    assert made[0].tokens == 4 * length and made[1].tokens == 2 * length
    assert made[0].step.bytes > made[1].step.bytes
    assert made[0].flops == pytest.approx(2 * made[1].flops, rel=0.01)


def test_a_deep_model_is_planned_from_shallow_ones_for_ranks_too() -> None:
    model = ModelConfig.from_dict(SMALL | {"num_hidden_layers": 11})
    for changes in ({}, {"method": "full"}):
        config = changed(settings(**changes), gpus=2)
        whole, few = (
            plan(model, config, gpu=False, dtype=torch.float32, simulations=Simulations(all_of_it))
            for all_of_it in (True, False)
        )
        # What a rank's optimizer puts into scratch follows from its tensors, which differ.
        assert few.step.bytes == pytest.approx(whole.step.bytes, rel=2e-3)
        assert few.save.owners["optimiser"] == whole.save.owners["optimiser"] > 0


def test_more_processes_than_tensors_or_blocks_are_planned() -> None:
    model = ModelConfig.from_dict(SMALL)
    config = changed(settings(target_modules="qv", lora_rank=1), gpus=64)
    for optimizer in ("adamw8bit", "adafactor"):
        plan(model, changed(config, optimizer=optimizer), gpu=False, dtype=torch.float32)


def test_processes_on_one_cpu_share_its_free_memory() -> None:
    model, cpu = ModelConfig.from_dict(SMALL), torch.device("cpu")
    config = changed(settings(gradient_checkpointing="auto"), batch_size=16)
    free = 2 * int(
        plan(
            model, changed(config, gradient_checkpointing="none"), gpu=False, dtype=torch.float32
        ).total
    )
    assert planned_policy(model, config, cpu, torch.float32, free=free)[0] == "none"
    together = changed(config, gpus=4)
    assert planned_policy(model, together, cpu, torch.float32, free=free)[0] != "none"
