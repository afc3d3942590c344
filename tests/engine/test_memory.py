"""The plan against a real step, byte by byte, and memory that does not grow.

The real step runs on a CPU under `MemoryMeter`; the plan is the same step without memory. Both are
of the second step of a run, when the optimizer's state and the scratch buffers are there.
"""

import dataclasses
import gc
from typing import Any

import psutil
import pytest
import torch

from engine.config import TrainConfig
from engine.data.loader import Batch
from engine.dry_pass import dry_pass
from engine.errors import MemoryPlanError
from engine.finetune import make_optimizer, make_trainable
from engine.load import build_model
from engine.memory import MemoryMeter, observed, track_model
from engine.model_presets import preset_config
from engine.plan import make_batch, plan
from engine.trainer import train_step
from models.config import ModelConfig
from models.decoder import Decoder
from models.registry import expected_tensors
from optim import AdamW8bit

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
NORMED = SMALL | {
    "model_type": "qwen3",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MODELS = {"llama": SMALL, "qwen3": NORMED}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "lora": {"method": "lora"},
    "full fine-tuning": {"method": "full"},
    "full recompute": {"gradient_checkpointing": "full"},
    "no recompute": {"gradient_checkpointing": "none"},
    "dropout": {"lora_dropout": 0.1},
    "two targets": {"target_modules": "qv"},
    "small chunks": {"loss_chunk_rows": 64},
    "single quantisation": {"double_quant": False},
    "32-bit moments": {"optimizer": "adamw"},
    "accumulation": {"accumulate": 2},
    "high rank": {"lora_rank": 64},
    "bfloat16": {"dtype": "bfloat16"},
    "short rows": {"max_length": 24},
}


class RandomCheckpoint:
    """A checkpoint of random bfloat16 weights, made when they are asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = expected_tensors(config)

    def tensor(self, name: str) -> torch.Tensor:
        return (torch.randn(self._shapes[name]) * 0.02).to(torch.bfloat16)

    def release(self, name: str) -> None:
        """Nothing is mapped."""


def prepared(
    model_config: ModelConfig, config: TrainConfig, dtype: torch.dtype
) -> tuple[Decoder, AdamW8bit]:
    checkpoint: Any = RandomCheckpoint(model_config)
    model = build_model(
        checkpoint,
        quantization="nf4" if config.method == "qlora" else None,
        double_quant=config.double_quant,
        dtype=dtype,
    )
    make_trainable(model, config, None)
    return model, make_optimizer(model, config)


def measured(
    model_config: ModelConfig, config: TrainConfig, batches: list[Batch], dtype: torch.dtype
) -> MemoryMeter:
    """The meter of the second real step."""
    model, optimizer = prepared(model_config, config, dtype)
    optimizer.state_tensors()
    meter = MemoryMeter()
    track_model(meter, model)
    meter.track("batch", [t for b in batches for t in (b.input_ids, b.labels, b.cu_seqlens)])
    meter.track("optimiser", optimizer.state_tensors().values())
    with observed(meter, fresh_scratch=True), meter:
        train_step(model, optimizer, batches, max_grad_norm=1.0, seed=1)
        meter.segments.clear()
        meter.begin("start")
        train_step(model, optimizer, batches, max_grad_norm=1.0, seed=1, step=1)
    return meter


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", device="cpu", **changes)


@pytest.fixture(autouse=True, scope="module")
def tables_made() -> None:
    """The small tables that a process makes once belong to no step."""
    config = settings()
    measured(ModelConfig.from_dict(SMALL), config, [make_batch([9])], torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", MODELS)
def test_the_plan_of_a_step_is_what_the_step_takes(family: str, name: str) -> None:
    config = settings(**SETTINGS[name])
    model = ModelConfig.from_dict(MODELS[family])
    lengths = [24, 9] if name == "short rows" else [100, 37, 163]
    batches = [make_batch(lengths)] * config.accumulate
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    real = measured(model, config, batches, dtype).peak
    dry = dry_pass(model, config, batches, card=False, dtype=dtype).step
    assert dry.bytes == pytest.approx(real.bytes, rel=0.001)
    for owner, size in real.owners.items():
        assert abs(dry.owners[owner] - size) <= 0.01 * real.bytes, owner


@pytest.mark.parametrize(
    "name", ["default", "lora", "full recompute", "no recompute", "dropout", "two targets"]
)
def test_the_plan_of_smollm2s_shape_is_what_its_step_takes(name: str) -> None:
    whole = preset_config("smollm2-135m")
    assert whole is not None
    model = dataclasses.replace(
        whole, num_hidden_layers=3, layer_types=whole.layer_types[:3], vocab_size=8192
    )
    config = settings(**SETTINGS[name])
    batches = [make_batch([40, 24])]
    real = measured(model, config, batches, torch.float32).peak
    dry = dry_pass(model, config, batches, card=False, dtype=torch.float32).step
    assert dry.bytes == pytest.approx(real.bytes, rel=0.001)


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "full"},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "none"},
        {"accumulate": 2},
        {"max_length": 8},
    ],
)
def test_a_deep_model_is_planned_from_shallow_ones(card: bool, changes: dict[str, Any]) -> None:
    model = ModelConfig.from_dict(SMALL | {"num_hidden_layers": 11})
    config = settings(**({"batch_size": 2, "max_length": 150} | changes))
    dtype = torch.bfloat16 if card else torch.float32
    whole = plan(model, config, card=card, dtype=dtype, whole=True)
    quick = plan(model, config, card=card, dtype=dtype)
    # On a card every tensor is rounded up to 512 bytes, which is not linear in anything.
    slack = 20_000 if card else 0
    for mine, theirs in ((quick.step, whole.step), (quick.load, whole.load)):
        assert abs(mine.bytes - theirs.bytes) <= slack
    assert abs(quick.save.bytes - whole.save.bytes) <= slack
    assert quick.flops == pytest.approx(whole.flops, rel=1e-9)
    assert quick.trainable == whole.trainable


def test_a_dry_pass_leaves_no_trace() -> None:
    model, config = ModelConfig.from_dict(SMALL), settings()
    device = torch.zeros(1).device
    for card in (False, True):
        dry_pass(model, config, [make_batch([30])], card=card, dtype=torch.float32)
    assert torch.zeros(1).device == device
    assert not torch.empty(1, device="meta").is_cuda
    real = measured(model, config, [make_batch([30])], torch.float32)
    assert real.peak.bytes > 0


def test_the_meter_counts_a_storage_once_and_forgets_it_when_it_is_freed() -> None:
    meter = MemoryMeter()
    with meter:
        x = torch.zeros(1000)
        y = x.view(10, 100)[:, 1:]
        assert meter.total == 4000
        z = y + 1
        assert meter.total == 4000 + 10 * 99 * 4
        del x, z
        assert meter.total == 4000
        del y
        assert meter.total == 0
    assert meter.peak.bytes == 4000 + 10 * 99 * 4


def test_the_meter_stops_a_step_at_its_limit() -> None:
    meter = MemoryMeter(limit=1 << 20)
    with pytest.raises(MemoryPlanError, match=r"budget of 1\.00 MiB"), meter:
        torch.zeros(1 << 19)


def test_memory_does_not_grow_over_two_hundred_steps() -> None:
    model_config = ModelConfig.from_dict(
        SMALL
        | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    )
    config = settings(lora_rank=4, lora_dropout=0.1)
    model, optimizer = prepared(model_config, config, torch.float32)
    batches = [make_batch([12])]
    meter = MemoryMeter()
    process, resident, counted = psutil.Process(), [], []
    with observed(meter, fresh_scratch=True), meter:
        for step in range(200):
            train_step(model, optimizer, batches, max_grad_norm=1.0, step=step)
            if step in (4, 199):
                gc.collect()
                counted.append(meter.total)
                resident.append(process.memory_info().rss)
    assert counted[0] == counted[1]
    assert resident[1] - resident[0] < 4 << 20
