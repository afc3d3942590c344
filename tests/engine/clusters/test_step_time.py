"""The model of a step's time: what is hidden, what is not, and what is sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.clusters.arrangement import Arrangement, arrangements
from engine.clusters.hardware import Cluster, link_of, network_of
from engine.clusters.rank_plan import RankPlan, RankPlanner, Thrift
from engine.clusters.ranking import rank_arrangements
from engine.clusters.step_time import step_time
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import plan
from engine.memory.model_shapes import preset_config
from models.config.model_config import ModelConfig

GIB = 2**30


def cluster(gpus: int = 8, machines: int = 1, link: str = "nvlink4") -> Cluster:
    return Cluster(gpus, 80 * GIB, 280e12, link_of(link), machines, network_of("100Gbit"))


def rank(arrangement: Arrangement, **changes: Any) -> RankPlan:
    config = TrainConfig(model="m", data="d", gradient_checkpointing="full")
    made = RankPlan(
        config, arrangement, 0, {}, 0, flops=280e12, passes=4, tokens=2048, layer=10**8, sums=10**8
    )
    return dataclasses.replace(made, **changes)


def test_a_ring_takes_as_long_as_its_narrowest_part() -> None:
    one = cluster()
    assert one.ring(0, 1) == 0.0
    assert one.ring(8e9, 8) == pytest.approx(7e9 / (0.8 * 450e9), rel=0.01)
    two = cluster(machines=2)
    assert two.ring(8e9) == pytest.approx(4e9 / (0.8 * 12.5e9), rel=0.01)
    assert cluster(machines=64).ring(8) > 64 * 12e-6 > cluster(machines=2).ring(8)


def test_a_gather_hides_behind_computation_that_lasts() -> None:
    model, divided = preset_config("llama-3.1-8b"), Arrangement(8, weights=True)
    assert model is not None
    fast = step_time(rank(divided), model, cluster(), 2)
    assert fast.exposed["layers"] == pytest.approx(cluster().ring(10**8))  # the first alone
    slow = step_time(rank(divided), model, cluster(link="pcie3"), 2)
    hidden = step_time(rank(divided, flops=280e13), model, cluster(link="pcie3"), 2)
    assert slow.exposed["layers"] > 3 * hidden.exposed["layers"]
    assert fast.seconds == fast.compute + sum(fast.exposed.values())


def test_what_is_divided_has_its_share_of_the_time() -> None:
    model = preset_config("qwen3-30b-a3b")
    assert model is not None

    def waits(arrangement: Arrangement, **changes: Any) -> set[str]:
        return {*step_time(rank(arrangement, **changes), model, cluster(link="pcie3"), 2).exposed}

    assert waits(Arrangement(1)) == set()
    plain = {"gradients", "parameters", "numbers"}
    assert waits(Arrangement(8)) == plain
    assert waits(Arrangement(8, weights=True)) == plain | {"layers"}
    assert waits(Arrangement(4, context=2)) == plain | {"context"}
    assert waits(Arrangement(8, experts=4)) == plain | {"experts"}
    full = TrainConfig(model="m", data="d", method="full")
    assert waits(Arrangement(8, weights=True), config=full) == {"layers", "numbers"}


SMALL_MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def test_a_rank_is_planned_as_the_run_itself_is() -> None:
    """Of every arrangement: memory, operations, and bytes to each collective."""
    model = ModelConfig.from_dict(SMALL_MIXTURE)
    config = TrainConfig(
        model="m", data="d", batch_size=1, accumulate=4, max_length=65536, lora_dropout=0.0,
        gradient_checkpointing="full",
    )  # fmt: skip
    planner, kinds = RankPlanner(model, torch.bfloat16, torch.bfloat16), set[str]()
    loads: dict[Arrangement, int] = {}
    operations: dict[Arrangement, float] = {}
    for arrangement in arrangements(model, config, 2, 2):
        made = planner(Thrift(config, 0.0), arrangement)
        asked = TrainConfig(
            **config.model_dump(exclude={"gpus", "shard", "context_parallel", "expert_parallel"}),
            **arrangement.settings,
        )
        own = plan(model, asked, gpu=True, dtype=torch.bfloat16, stored=torch.bfloat16)
        assert (made.memory, made.flops, made.sent) == (own.total, own.flops, own.sent)
        kinds |= set(made.sent)
        loads[arrangement], operations[arrangement] = own.load.bytes, own.flops
    assert kinds == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}
    # What each has of the experts it alone holds, while it reads them.
    divided = [one for one in loads if one.experts == 2]
    assert all(loads[one] < loads[dataclasses.replace(one, experts=1)] for one in divided)
    assert len(divided) == len(loads) / 2
    for one, count in operations.items():  # the head's are counted wherever its rows are
        whole = operations[dataclasses.replace(one, weights=False)]
        assert count == pytest.approx(whole, rel=1e-3), one


def test_context_is_split_for_long_rows_or_few() -> None:
    model = preset_config("llama-3.1-8b")
    assert model is not None

    def contexts(**changes: Any) -> set[int]:
        config = TrainConfig(model="m", data="d", **changes)
        return {a.context for a in arrangements(model, config, 8, 8)}

    assert contexts(batch_size=8) == {1}
    assert contexts(batch_size=2) == {1, 4, 8}
    assert contexts(batch_size=8, max_length=65536) == {1, 2, 4, 8}


def test_what_excludes_nothing_is_combined_and_what_does_is_left_out() -> None:
    model = preset_config("qwen3-30b-a3b")
    assert model is not None

    def options(**changes: Any) -> set[str]:
        config = TrainConfig(model="m", data="d", batch_size=8, **changes)
        return {a.options for a in arrangements(model, config, 8, 8)}

    assert {
        "data parallel alone",
        "--shard weights",
        "--expert-parallel 8",
        "--shard weights --context-parallel 4 --expert-parallel 8",
    } <= options(max_length=65536)
    whole = options(optimizer="adafactor")
    assert whole == {"data parallel alone", "--shard weights"}  # experts have an update together
    assert options(method="full") == {"data parallel alone", "--shard weights"}
    assert options(method="full", optimizer="muon") == {"data parallel alone"}


def test_context_leaves_a_machine_where_rows_are_fewer_than_machines() -> None:
    model = preset_config("llama-3.1-8b")
    assert model is not None
    config = TrainConfig(model="m", data="d", batch_size=1, accumulate=2, max_length=10**6)
    assert {a.context for a in arrangements(model, config, 64, 8)} == {1, 32}
    rows = TrainConfig(model="m", data="d", batch_size=8, max_length=10**6)
    assert {a.context for a in arrangements(model, rows, 64, 8)} == {1, 8}


def test_rows_too_long_for_a_gpu_are_split_and_the_most_frugal_settings_come_last() -> None:
    raw = {
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    model = ModelConfig.from_dict(raw)
    config = TrainConfig(
        model="m", data="d", batch_size=1, accumulate=1, max_length=262_144, lora_dropout=0.0
    )
    small = dataclasses.replace(cluster(), memory=2 * GIB)
    ranked = rank_arrangements(model, config, small, torch.bfloat16, torch.bfloat16)
    assert ranked[0].arrangement.context == 8 and ranked[0].plan is not None
    alone = next(one for one in ranked if one.arrangement == Arrangement(8))
    assert "needed" in alone.why_not and alone.plan is None
    large = rank_arrangements(model, config, cluster(), torch.bfloat16, torch.bfloat16)
    fits = next(one for one in large if one.arrangement == Arrangement(8))
    assert fits.plan is not None and fits.plan.cost == 0.0


@pytest.mark.parametrize("name", ["fast", "0Gbit", "Gbit"])
def test_an_unknown_network_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--network is"):
        network_of(name)
