"""The plan of one rank of several: what it holds, byte for byte, and its largest pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel, JoinedParallel, named_pieces
from engine.distributed.deal import PassLimits, deal_by_cost, deal_in_order
from engine.distributed.dealing import cost_of
from engine.memory.auto_policy import planned_policy
from engine.memory.estimate import MemoryPlan, Simulations, make_batch, plan, step_of, workload
from engine.memory.search import changed
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed, track_model, track_parallel
from engine.model_sources.load_model import build_for
from engine.training.step import StepRanks, TrainingStep
from engine.training.trainable import (
    backward_units,
    make_trainable,
    piece_optimizer,
    step_settings,
    works_on_matrices,
)
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.config.model_config import ModelConfig
from tests.support.tiny_model import RandomSource

ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "two passes": {"accumulate": 2, "lora_rank": 64, "optimizer": "adamw"},
    "all weights": {"method": "full"},
    "whole matrices": {"optimizer": "adafactor", "lora_rank": 64},
}
PROGRAM = """
import sys, torch.distributed as dist
from engine.distributed.torch_ranks import TorchRanks
from tests.engine.distributed.test_rank_memory import tell
meeting, rank, size = "file://" + sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
tell(TorchRanks())
dist.destroy_process_group()
"""


def settings(**changes: Any) -> TrainConfig:
    common = {"gradient_checkpointing": "selective", "lora_dropout": 0.0}
    return TrainConfig(model="m", data="d", device="cpu", **common | changes)


def peak_of(ranks: Ranks, config: TrainConfig) -> int:
    """The bytes of the second real step of one rank."""
    source: Any = RandomSource(ModelConfig.from_dict(SMALL))
    model = build_for(config, source, torch.device("cpu"), torch.float32)
    make_trainable(model, config, None)
    whole = works_on_matrices(config)
    parallel = DataParallel(ranks, backward_units(model), whole=whole)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = piece_optimizer(named_pieces(parallel, names), config)
    batches = [make_batch([100, 37, 163])] * config.accumulate
    meter = MemoryMeter()
    track_model(meter, model)
    track_parallel(meter, parallel)
    meter.track("batch", [t for b in batches for t in b.tensors()])
    meter.track("optimiser", optimizer.state_tensors().values())
    how = step_settings(config)
    step = TrainingStep(model, optimizer, how, config.max_grad_norm, seed=1, parallel=parallel)
    with observed(meter, fresh_scratch=True), meter:
        step(batches)
        meter.segments.clear()
        meter.begin("start")
        step(batches, 1)
    return meter.peak.bytes


def tell(ranks: Ranks) -> None:
    """Print the peaks of every setting, as one of several processes."""
    torch.set_num_threads(1)
    peak_of(ranks, settings())  # which makes the small tables of the process
    print(json.dumps({name: peak_of(ranks, settings(**SETTINGS[name])) for name in SETTINGS}))


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_what_was_planned(size: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "meeting")]
    started = [
        subprocess.Popen([*command, str(r), str(size)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    told = [json.loads(process.communicate(timeout=300)[0]) for process in started]
    model = ModelConfig.from_dict(SMALL)
    for name, changes in SETTINGS.items():
        config = changed(settings(**changes), gpus=size)
        batches = [make_batch([100, 37, 163])] * config.accumulate
        made = plan(model, config, gpu=False, dtype=torch.float32, work=batches)
        most = max(peaks[name] for peaks in told)
        assert made.step.bytes == pytest.approx(most, rel=0.01 if config.every_weight else 0.001), (
            name
        )
        alone = plan(model, settings(**changes), gpu=False, dtype=torch.float32, work=batches)
        assert alone.step.bytes != made.step.bytes, name


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
    st.integers(2, 5),
    st.sampled_from(["by cost", "in order", "packed"]),
)
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
    planned = step_of(changed(config, gpus=ranks), lengths, model)
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
