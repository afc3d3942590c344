"""The plan of a step over answers is what such a step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.memory.estimate import make_batch, step_of, workload
from engine.memory.simulate.answers import planned_objective
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed, track_model
from engine.memory.simulate.step import simulate_step
from engine.model_sources.load_model import build_for
from engine.training.step import TrainingStep
from engine.training.trainable import make_optimizer, make_trainable, step_settings
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch
from tests.support.tiny_model import RandomSource

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CHANGES: dict[str, dict[str, Any]] = {
    "pairs": {"objective": "dpo"},
    "shared": {"objective": "dpo", "share_prompt": True, "gradient_checkpointing": "none"},
    "judged": {"objective": "kto", "accumulate": 2},
    "full": {"objective": "orpo", "method": "full"},
}


def settings(**changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {"gradient_checkpointing": "selective", "device": "cpu"}
    return TrainConfig(model="m", data="d", **(plain | changes))


def measured(model_config: ModelConfig, config: TrainConfig, batches: list[PackedBatch]) -> int:
    """The peak bytes of the second real step."""
    source: Any = RandomSource(model_config)
    model = build_for(config, source, torch.device("cpu"), torch.float32)
    make_trainable(model, config, None)
    optimizer, meter = make_optimizer(model, config), MemoryMeter()
    optimizer.state_tensors()
    track_model(meter, model)
    meter.track("batch", [t for b in batches for t in b.tensors()])
    meter.track("optimiser", optimizer.state_tensors().values())
    step = TrainingStep(
        model,
        optimizer,
        step_settings(config),
        config.max_grad_norm,
        objective=planned_objective(config, batches),
    )
    with observed(meter, fresh_scratch=True), meter:
        step(batches)
        meter.segments.clear()
        meter.begin("start")
        step(batches, 1)
    return meter.peak.bytes


@pytest.mark.parametrize("name", CHANGES)
def test_the_plan_of_a_step_over_answers_is_what_the_step_takes(name: str) -> None:
    config, model = settings(**CHANGES[name]), ModelConfig.from_dict(SMALL)
    batches = [make_batch([100, 37, 163], config)] * config.accumulate
    assert sum(batch.tokens for batch in batches) == 300 * config.accumulate
    # The first step of a process makes small tables that belong to none.
    measured(model, config, [make_batch([9], config)] * config.accumulate)
    real = measured(model, config, batches)
    simulated = simulate_step(model, config, batches, gpu=False, dtype=torch.float32).step
    assert simulated.bytes == pytest.approx(real, rel=0.001)
    assert simulate_step(model, config, batches, gpu=True, dtype=torch.float32).step.bytes > 0


def test_a_pair_may_be_two_rows_long() -> None:
    config = settings(objective="dpo", max_length=64, batch_size=2)
    assert workload(config).micro_batches == ((128, 128),)
    assert step_of(config, [300, 100, 90], ModelConfig.from_dict(SMALL)).micro_batches == (
        (128, 100),
    )
    assert workload(settings(max_length=64, batch_size=2)).micro_batches == ((64, 64),)
