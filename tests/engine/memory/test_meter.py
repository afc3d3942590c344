"""The plan against a real step, byte by byte, and memory that does not grow.

The real step runs on a CPU under `MemoryMeter`; the plan is the same step without memory. Both are
of the second step of a run, when the optimizer's state and the scratch buffers are there.
"""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError
from engine.memory.estimate import MemoryPlan, Simulations, make_batch, plan
from engine.memory.model_shapes import preset_config
from engine.memory.simulate.meter import MemoryMeter, Peak
from engine.memory.simulate.observer import observed, track_model
from engine.memory.simulate.step import simulate_step
from engine.model_sources.load_model import build_for
from engine.training.step import TrainingStep
from engine.training.trainable import (
    make_in_backward,
    make_optimizer,
    make_trainable,
    step_settings,
)
from kernels.runtime.scratch import buffers, release, scratch
from models.config.heads_per_layer import PER_LAYER
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.block import DecoderLayer
from models.layers.packed_batch import PackedBatch
from models.memory.offload import WeightStream
from optim import StepOptimizer
from tests.support.tiny_model import RandomSource

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

IN_BACKWARD = {"method": "full", "max_grad_norm": 0.0, "optimizer_in_backward": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "lora": {"method": "lora"},
    "full fine-tuning": {"method": "full"},
    "full fine-tuning in backward": IN_BACKWARD,
    "in backward, full recompute": {
        **IN_BACKWARD,
        "gradient_checkpointing": "full",
        "dtype": "bfloat16",
    },
    "full recompute": {"gradient_checkpointing": "full"},
    "no recompute": {"gradient_checkpointing": "none"},
    "dropout": {"lora_dropout": 0.1},
    "hidden dropout": {"method": "full", "hidden_dropout": 0.1},
    "attention dropout": {"method": "full", "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "dropout in bfloat16": {
        "method": "full",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "dtype": "bfloat16",
        "mlp_tile_tokens": 48,
    },
    "dora": {"use_dora": True},
    "dora on dense weights": {"use_dora": True, "method": "lora"},
    "two targets": {"target_modules": "qv"},
    "small chunks": {"loss_chunk_tokens": 64},
    "single quantisation": {"double_quant": False},
    "32-bit moments": {"optimizer": "adamw"},
    "lion": {"optimizer": "lion8bit"},
    "adafactor in backward": {**IN_BACKWARD, "optimizer": "adafactor"},
    "muon": {"method": "full", "optimizer": "muon", "dtype": "bfloat16"},
    "ranks in some layers": {"layers": "1-2", "rank_pattern": {"q_proj": 40}, "method": "lora"},
    "whole modules": {"modules_to_save": "embed_tokens,lm_head"},
    "whole head in bfloat16": {"modules_to_save": "lm_head", "dtype": "bfloat16"},
    "noise and terms": {"neftune_noise_alpha": 5.0, "label_smoothing_factor": 0.1, "z_loss": 1e-4},
    "accumulation": {"accumulate": 2},
    "high rank": {"lora_rank": 64},
    "bfloat16": {"dtype": "bfloat16"},
    "short rows": {"max_length": 24},
    "8-bit head": {"head_precision": "8bit"},
    "embedding on the host": {"embedding_on": "host"},
    "tiles": {"mlp_tile_tokens": 48},
    "tiles with full recompute": {"mlp_tile_tokens": 100, "gradient_checkpointing": "full"},
    "single weights": {"low_memory_decode": True},
    "policies by layer": {"gradient_checkpointing": "full:1,none"},
    "one layer decoded to stay": {"keep_decoded": "1"},
    "all layers decoded to stay": {"keep_decoded": "99", "dtype": "bfloat16", "accumulate": 2},
    "streamed weights": {"offload": ("weights",)},
    "everything": {
        "mlp_tile_tokens": 48,
        "low_memory_decode": True,
        "head_precision": "8bit",
        "gradient_checkpointing": "full",
        "offload": ("checkpoints", "weights"),
        "loss_chunk_tokens": 64,
    },
}


def prepared(
    model_config: ModelConfig, config: TrainConfig, dtype: torch.dtype
) -> tuple[Decoder, StepOptimizer]:
    source: Any = RandomSource(model_config)
    model = build_for(config, source, torch.device("cpu"), dtype)
    make_trainable(model, config, None)
    return model, make_optimizer(model, config)


def measured(
    model_config: ModelConfig, config: TrainConfig, batches: list[PackedBatch], dtype: torch.dtype
) -> MemoryMeter:
    """The meter of the second real step."""
    model, optimizer = prepared(model_config, config, dtype)
    optimizer.state_tensors()
    meter = MemoryMeter()
    track_model(meter, model)
    meter.track("batch", [t for b in batches for t in b.tensors()])
    meter.track("optimiser", optimizer.state_tensors().values())
    step = TrainingStep(
        model,
        optimizer,
        step_settings(config),
        config.max_grad_norm,
        seed=1,
        in_backward=make_in_backward(model, optimizer, config),
    )
    with observed(meter, fresh_scratch=True), meter:
        step(batches)
        meter.segments.clear()
        meter.begin("start")
        step(batches, 1)
    return meter


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(
        model="m", data="d", device="cpu", **{"gradient_checkpointing": "selective"} | changes
    )


@pytest.fixture(autouse=True, scope="module")
def tables_made() -> None:
    """The small tables that a process makes once belong to no step."""
    config = settings()
    measured(ModelConfig.from_dict(SMALL), config, [make_batch([9])], torch.float32)


def planned_and_measured(family: str, name: str, lengths: list[int]) -> tuple[Peak, Peak]:
    """The peaks of a step of packed documents: of its plan, and of the step itself."""
    config = settings(**SETTINGS[name])
    model = ModelConfig.from_dict(MODELS[family])
    if config.embedding_on == "host" and model.tie_word_embeddings:
        model = dataclasses.replace(model, tie_word_embeddings=False)
    batches = [make_batch(lengths)] * config.accumulate
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    real = measured(model, config, batches, dtype).peak
    return simulate_step(model, config, batches, gpu=False, dtype=dtype).step, real


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", MODELS)
def test_the_plan_of_a_step_is_what_the_step_takes(family: str, name: str) -> None:
    lengths = [24, 9] if name == "short rows" else [100, 37, 163]
    simulated, real = planned_and_measured(family, name, lengths)
    assert simulated.bytes == pytest.approx(real.bytes, rel=0.001)
    for owner, size in real.owners.items():
        assert abs(simulated.owners[owner] - size) <= 0.01 * real.bytes, owner


@pytest.mark.parametrize(
    "name",
    ["default", "lora", "full recompute", "no recompute", "dropout", "two targets", "small chunks",
     "high rank", "8-bit head", "tiles", "single weights", "everything"],
)  # fmt: skip
def test_the_plan_of_smollm2s_shape_is_what_its_step_takes(name: str) -> None:
    whole = preset_config("smollm2-135m")
    assert whole is not None
    model = dataclasses.replace(whole.with_layers(3), vocab_size=8192)
    config = settings(**SETTINGS[name])
    batches = [make_batch([40, 24])]
    real = measured(model, config, batches, torch.float32).peak
    simulated = simulate_step(model, config, batches, gpu=False, dtype=torch.float32).step
    assert simulated.bytes == pytest.approx(real.bytes, rel=0.001)


def quick_and_whole(model: ModelConfig, config: TrainConfig, gpu: bool) -> list[MemoryPlan]:
    dtype, each = torch.bfloat16 if gpu else torch.float32, Simulations(whole=True)
    return [plan(model, config, gpu=gpu, dtype=dtype, simulations=s) for s in (None, each)]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "full"},
        {"method": "full", "max_grad_norm": 0.0, "optimizer_in_backward": True},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "none"},
        {"accumulate": 2},
        {"max_length": 8},
        {"keep_decoded": "1"},
        {"keep_decoded": "7", "gradient_checkpointing": "none"},
        {"keep_decoded": "11"},
        {"gradient_checkpointing": "full:7,selective"},
        {"gradient_checkpointing": "selective:2,none", "accumulate": 2},
        {"gradient_checkpointing": "full:10,none", "method": "full"},
        {"gradient_checkpointing": "full:6,none:3,selective"},
        {"gradient_checkpointing": "full:7,selective", "keep_decoded": "1"},
        {"gradient_checkpointing": "full:3,none", "keep_decoded": "5"},
        {"gradient_checkpointing": "selective:8,none", "keep_decoded": "10", "mlp_tile_tokens": 48},
        {"mlp_tile_tokens": 48, "low_memory_decode": True, "offload": ("checkpoints", "weights")},
        {"head_precision": "8bit", "embedding_on": "host", "offload": ("checkpoints",)},
    ],
)
def test_a_deep_model_is_planned_from_shallow_ones(gpu: bool, changes: dict[str, Any]) -> None:
    model = ModelConfig.from_dict(SMALL | {"num_hidden_layers": 11})
    config = settings(**({"batch_size": 2, "max_length": 150} | changes))
    quick, whole = quick_and_whole(model, config, gpu)
    # On a GPU every tensor is rounded up to 512 bytes, which is not linear in anything.
    slack = 20_000 if gpu else 0
    for mine, theirs in ((quick.step, whole.step), (quick.load, whole.load)):
        assert abs(mine.bytes - theirs.bytes) <= slack
    assert abs(quick.save.bytes - whole.save.bytes) <= slack
    assert quick.flops == pytest.approx(whole.flops, rel=1e-9)
    assert quick.trainable == whole.trainable


def test_a_simulated_step_leaves_no_trace() -> None:
    model, config = ModelConfig.from_dict(SMALL), settings()
    device = torch.zeros(1).device
    for gpu in (False, True):
        simulate_step(model, config, [make_batch([30])], gpu=gpu, dtype=torch.float32)
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


@pytest.mark.parametrize(("leaks", "steps"), [(False, 200), (True, 60)])
def test_memory_does_not_grow_over_two_hundred_steps(
    leaks: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_config = ModelConfig.from_dict(
        SMALL
        | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    )
    config = settings(lora_rank=4, lora_dropout=0.1)
    model, optimizer = prepared(model_config, config, torch.float32)
    batches = [make_batch([256])]
    activation = 256 * 64 * 4
    if leaks:  # one activation a step: both measures must see it
        run, leaked_tensors = DecoderLayer.forward, []

        def leaking(layer: DecoderLayer, *args: Any) -> Any:
            result = run(layer, *args)
            leaked_tensors.append(result[0].detach().clone())
            return result

        monkeypatch.setattr(DecoderLayer, "forward", leaking)
    meter = MemoryMeter()
    process, resident, counted = psutil.Process(), [], []
    with observed(meter, fresh_scratch=True), meter:
        train = TrainingStep(model, optimizer, step_settings(config), max_grad_norm=1.0)
        for step in range(steps):
            train(batches, step)
            if step in (4, steps - 1):
                gc.collect()
                counted.append(meter.total)
                resident.append(process.memory_info().rss)
    leaked = (steps - 5) * activation if leaks else 0
    assert counted[1] - counted[0] == leaked
    assert (resident[1] - resident[0] < 3 << 20) is not leaks


@pytest.mark.parametrize(
    "name",
    ["default", "no recompute", "full recompute", "tiles with full recompute", "streamed weights"],
)
@pytest.mark.parametrize(
    "family", ["smollm3", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe_vl"]
)
def test_the_plan_of_other_families_is_what_a_step_takes(
    family: str, name: str, golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts that are as large a part as in real mixtures, and real copies of weights."""
    raw = json.loads((golden(family) / "config.json").read_text())
    text = raw.get("text_config", raw)
    if "moe_intermediate_size" in text:
        text["moe_intermediate_size"] = 128
    model = ModelConfig.from_dict(raw)
    config, batches = settings(**SETTINGS[name]), [make_batch([100, 37, 163])]
    init = WeightStream.__init__

    def moving(stream: WeightStream, *args: Any) -> None:
        init(stream, *args)
        stream._is_gpu = True

    monkeypatch.setattr(WeightStream, "__init__", moving)
    real = measured(model, config, batches, torch.float32).peak
    simulated = simulate_step(model, config, batches, gpu=False, dtype=torch.float32).step
    # How many rows an expert gets is known to a plan on average alone.
    assert simulated.bytes == pytest.approx(real.bytes, rel=0.01 if model.num_experts else 0.001)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_the_plan_of_layers_with_unequal_heads_is_what_a_step_takes(policy: str) -> None:
    heads, kv_heads = [4, 2, 1], [2, 2, 1]
    lists = dict(zip(PER_LAYER, (heads, kv_heads), strict=True))
    model = ModelConfig.from_dict(SMALL | {"head_dim": 16} | lists)
    config, batches = settings(gradient_checkpointing=policy), [make_batch([100, 37, 163])]
    real = measured(model, config, batches, torch.float32).peak
    simulated = simulate_step(model, config, batches, gpu=False, dtype=torch.float32).step
    assert simulated.bytes == pytest.approx(real.bytes, rel=0.001)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"mlp_tile_tokens": 48, "offload": ("checkpoints", "weights")}]
)
def test_a_deep_hybrid_is_planned_from_two_and_three_of_its_periods(
    gpu: bool, changes: dict[str, Any], golden: Callable[[str], Path]
) -> None:
    raw = json.loads((golden("qwen3_next") / "config.json").read_text())
    model = ModelConfig.from_dict(raw).with_layers(10)
    assert model.period == 2
    config = settings(batch_size=2, max_length=150, **changes)
    quick, whole = quick_and_whole(model, config, gpu)
    assert quick.step.bytes == pytest.approx(whole.step.bytes, rel=0.002)
    assert quick.host == pytest.approx(whole.host, rel=0.002)
    assert quick.flops == pytest.approx(whole.flops, rel=1e-9)
    assert quick.trainable == whole.trainable


def test_a_scratch_buffer_that_grows_is_counted_once() -> None:
    release()
    cpu = torch.device("cpu")
    scratch("logits", (1000,), torch.float32, cpu)
    meter = MemoryMeter()
    with observed(meter), meter:
        scratch("logits", (2000,), torch.float32, cpu)
    assert meter.peak.owners["loss chunk"] == 8000
    assert [buffer.numel() for buffer in buffers()] == [2000]
