"""What each memory option saves on a GPU, in the bytes of a simulated step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.memory.estimate import make_batch, plan
from engine.memory.simulate.step import SimulatedStep, simulate_step
from models.config.model_config import ModelConfig

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def simulated(**changes: Any) -> SimulatedStep:
    """The simulated step of a step on a GPU."""
    return simulate_step(
        ModelConfig.from_dict(SHAPE),
        TrainConfig(model="m", data="d", gradient_checkpointing="full", **changes),
        [make_batch([100, 60])],
        gpu=True,
        dtype=torch.bfloat16,
    )


def test_every_memory_option_saves_the_bytes_that_it_should() -> None:
    plain = simulated()
    table = 1000 * 256 * 2
    head = simulated(head_precision="8bit").resident["head"]
    assert plain.resident["head"] == table
    assert table // 2 + 1000 * 4 <= head < table // 2 + 1000 * 4 + 512
    gathered = simulated(embedding_on="host")
    assert (plain.resident["embeddings"], plain.host) == (table, 0)
    assert (gathered.resident["embeddings"], gathered.host) == (0, table)
    inputs = simulated(offload=("checkpoints",))
    rows = 160 * 256 * 2
    # torch rounds a pinned block up to a power of two.
    assert inputs.host == 6 * (1 << (rows - 1).bit_length())
    before, after = (r.segments["backward", 5].bytes for r in (plain, inputs))
    # Of six layers' inputs the last is still there and the one below on its way back.
    assert before - after == pytest.approx(4 * rows, abs=2048)
    streamed = simulated(offload=("weights",))
    layer = streamed.resident["NF4 base"]  # the first, which stays for the next step
    assert plain.resident["NF4 base"] == 6 * layer
    # Host memory is registered by the page, each of a layer's tensors by itself.
    assert 6 * layer <= streamed.host <= 6 * (layer + 7 * 4 * 4096)
    assert streamed.segments["backward", 2].owners["NF4 base"] == 2 * layer
    assert streamed.step.bytes < plain.step.bytes
    assert streamed.load.bytes < plain.load.bytes


def test_tiles_and_single_weights_save_what_they_leave_out() -> None:
    plain, tiled, single = (
        simulated(),
        simulated(mlp_tile_tokens=32),
        simulated(low_memory_decode=True),
    )
    work = [r.segments["backward", 2].owners["block working set"] for r in (plain, tiled)]
    # gate, up, silu(gate) * up and its gradient: four times 128 tokens fewer, 2048 wide, 2 bytes;
    # attention, which was the lesser part by half of that, is the greater now.
    assert work[0] - work[1] >= 4 * 128 * 2048 * 2 * 0.38
    scratch = [r.resident["scratch"] for r in (plain, single)]
    rank, inner, hidden = 16, 2048, 256
    group = (2 * inner + 2 * rank) * (hidden + 2 * rank)
    alone = (inner + rank) * (hidden + rank)
    # Both also hold the weight of one projection, forward and backward.
    assert scratch[0] - scratch[1] == 2 * group
    assert 2 * alone <= scratch[1] <= 4 * alone


@pytest.mark.parametrize(("rows", "accumulate"), [(1, 1), (2, 8), (64, 2)])
def test_batches_ahead_are_in_the_plan_of_a_gpu(rows: int, accumulate: int) -> None:
    """Two steps' batches on the device, in whole segments; pinned and plain ones on the host."""
    length, shape = 1000, ModelConfig.from_dict(SHAPE)
    config = TrainConfig(
        model="m",
        data="d",
        gradient_checkpointing="full",
        max_length=length,
        batch_size=rows,
        accumulate=accumulate,
    )
    planned = plan(shape, config, gpu=True, dtype=torch.bfloat16)
    tokens, trained = rows * length, rows * (length - 1)

    def padded(size: int) -> int:
        return -(-size // 128) * 128

    sent = padded(8 * tokens) + 2 * padded(8 * trained) + padded(4 * (rows + 1))
    counted = min(accumulate, 2) * -(-sent // 512) * 512
    assert planned.step.owners["batch"] == counted
    segment = 2 << 20 if sent <= 1 << 20 else 20 << 20
    segments = -(-2 * accumulate * sent // segment)
    assert planned.reserve["batches ahead"] == segments * segment - counted
    plain = 8 * tokens + 16 * trained + 4 * (rows + 1)
    pinned = 1 << (sent - 1).bit_length()
    assert planned.batch_host == accumulate * (2 * plain + pinned)
    on_cpu = plan(shape, config, gpu=False, dtype=torch.float32)
    assert "batches ahead" not in on_cpu.reserve
    assert on_cpu.batch_host == 0
    assert on_cpu.step.owners["batch"] == min(accumulate, 2) * plain
