"""The model of a step's time: what is hidden, what is not, and what is sent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.clusters.arrangement import Arrangement, arrangements
from engine.clusters.hardware import Cluster, link_of, network_of
from engine.clusters.rank_plan import RankPlan
from engine.clusters.step_time import step_time
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.model_shapes import preset_config

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


def test_bytes_sent_are_those_of_the_parts() -> None:
    model = preset_config("llama-3.1-8b")
    assert model is not None
    plain = step_time(rank(Arrangement(8)), model, cluster(), 2).sent
    assert plain == {"reduce_scatter": 10**8, "all_gather": 10**8 // 8, "all_reduce": 72}
    divided = step_time(rank(Arrangement(8, weights=True)), model, cluster(), 2).sent
    again = 4 * 2 * (model.num_hidden_layers - 2)
    assert divided["all_gather"] == plain["all_gather"] + again * 10**8 // 8
    assert step_time(rank(Arrangement(1)), model, cluster(1), 2).sent == {}
    assert "all_to_all" in step_time(rank(Arrangement(4, context=2)), model, cluster(), 2).sent


def test_context_is_split_for_long_rows_or_few() -> None:
    model = preset_config("llama-3.1-8b")
    assert model is not None

    def contexts(**changes: Any) -> set[int]:
        config = TrainConfig(model="m", data="d", **changes)
        return {a.context for a in arrangements(model, config, 8, 8)}

    assert contexts(batch_size=8) == {1}
    assert contexts(batch_size=2) == {1, 4, 8}
    assert contexts(batch_size=8, max_length=65536) == {1, 2, 4, 8}


@pytest.mark.parametrize("name", ["fast", "0Gbit", "Gbit"])
def test_an_unknown_network_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--network is"):
        network_of(name)
