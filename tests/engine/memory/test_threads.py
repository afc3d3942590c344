"""A thread that trains while another plans is undisturbed, and so is the plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.memory.estimate import plan
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed
from engine.model_sources.load_model import build_for
from engine.training.step import TrainingStep
from engine.training.trainable import (
    make_in_backward,
    make_optimizer,
    make_trainable,
    step_settings,
)
from kernels.runtime.scratch import buffers
from kernels.runtime.simulation import Simulation, simulate_with, simulation
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch
from models.tensor_names import expected_tensors

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "qlora": {"lora_dropout": 0.1},
    "full, in backward": {"method": "full", "max_grad_norm": 0.0, "optimizer_in_backward": True},
}
STEPS = 12


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(
        model="m", data="d", device="cpu", gradient_checkpointing="selective", **changes
    )


class RandomSource:
    """A model of random weights, the same every time."""

    def __init__(self) -> None:
        self.config = ModelConfig.from_dict(SHAPE)
        self._shapes = expected_tensors(self.config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(list(self._shapes).index(name))
        return torch.randn(self._shapes[name], generator=generator) * 0.05

    def codes(self, name: str) -> None:
        """Nothing is stored in codes."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def trained(config: TrainConfig, before_step: Callable[[int], None]) -> list[Tensor]:
    """All parameters after some steps, and the losses."""
    torch.manual_seed(0)
    model = build_for(config, cast(Any, RandomSource()), torch.device("cpu"), torch.float32)
    make_trainable(model, config, None)
    optimizer = make_optimizer(model, config)
    run = TrainingStep(
        model,
        optimizer,
        step_settings(config),
        config.max_grad_norm,
        seed=3,
        in_backward=make_in_backward(model, optimizer, config),
    )
    losses = []
    for step in range(STEPS):
        before_step(step)
        ids = torch.arange(81 + step).mul_(7 + step) % 300
        batch = PackedBatch.of(ids, ids, torch.tensor([0, 50 + step, 81 + step]))
        losses.append(run([batch], step).loss)
    return [torch.tensor(losses), *(p.detach().clone() for p in model.parameters())]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_thread_that_trains_is_undisturbed_by_one_that_plans(name: str) -> None:
    config, shape = settings(**SETTINGS[name]), ModelConfig.from_dict(SHAPE)
    alone = trained(config, lambda step: None)
    planned, done, plans = threading.Semaphore(0), threading.Event(), []
    faults: list[BaseException] = []

    def keep_planning() -> None:
        try:
            while not done.is_set():
                for gpu in (False, True):
                    dtype = torch.bfloat16 if gpu else torch.float32
                    plans.append((gpu, plan(shape, config, gpu=gpu, dtype=dtype).step.owners))
                    planned.release()
        except BaseException as fault:
            faults.append(fault)
            planned.release(1000)

    def wait_for_a_plan(step: int) -> None:
        if step % 2:  # so that plans run all along
            planned.acquire()

    thread = threading.Thread(target=keep_planning)
    thread.start()
    try:
        together = trained(config, wait_for_a_plan)
    finally:
        done.set()
        thread.join()
    assert faults == []
    assert all(map(torch.equal, alone, together)), "the bits differ"
    assert len(plans) >= STEPS // 2
    for gpu in (False, True):
        owners = [bytes_of for planned_gpu, bytes_of in plans if planned_gpu is gpu]
        assert all(other == owners[0] for other in owners)
        dtype = torch.bfloat16 if gpu else torch.float32
        assert plan(shape, config, gpu=gpu, dtype=dtype).step.owners == owners[0]


def test_a_simulation_and_a_meter_are_seen_by_their_own_thread_alone() -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(simulation())
        seen.append(buffers())

    with simulate_with(cast(Simulation, object())), observed(MemoryMeter(), fresh_scratch=True):
        assert simulation() is not None
        assert buffers() == []
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen[0] is None
    assert simulation() is None
    assert seen[1] == buffers()
