"""Products of experts in a simulated step: launches, operations, decoded weights, time."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.memory.estimate import Simulations, make_batch, plan
from engine.memory.simulate import step
from engine.memory.simulate.device import ASSUMED_GPU, GPU, OnGPU
from engine.memory.simulate.observer import observed
from engine.memory.simulate.simulated_meter import SimulatedMeter
from kernels.moe import grouped_library
from kernels.moe.grouped_choice import LIBRARY_ROWS
from kernels.moe.grouped_matmul import Groups, grouped_matmul, planar_experts
from kernels.nf4 import quantize
from kernels.runtime.scratch import buffers
from kernels.runtime.simulation import simulate_with
from models.config.model_config import ModelConfig

needs_grouped_mm = pytest.mark.skipif(
    not hasattr(torch, "_grouped_mm"), reason="this torch has no _grouped_mm"
)
COUNT, OUT, IN = 2, 64, 128


class Launches(SimulatedMeter):
    """A simulated step that notes the names of the kernels that it is asked to launch."""

    def __init__(self, multiplies_groups: bool) -> None:
        super().__init__(dataclasses.replace(ASSUMED_GPU, multiplies_groups=multiplies_groups))
        self.kernels: list[str] = []

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        self.kernels.append(kernel.__name__)
        return super().launch(kernel, operations)


def simulated(
    meter: Launches, per_expert: int, transpose: bool, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Simulate one product; bytes of the scratch that there is after it."""
    with simulate_with(meter), observed(meter, fresh_scratch=True), OnGPU(), meter:
        dense = torch.empty(COUNT, OUT, IN, dtype=dtype, device=GPU)
        weight = planar_experts(quantize(dense))
        offsets = torch.tensor([0, per_expert, COUNT * per_expert], dtype=torch.int32)
        x = torch.empty(COUNT * per_expert, OUT if transpose else IN, dtype=dtype, device=GPU)
        meter.kernels, meter.flops = [], 0.0
        y = grouped_matmul(x, weight, Groups(offsets, x.shape[0]), transpose=transpose)
        assert y.shape == (COUNT * per_expert, IN if transpose else OUT)
        return sum(buffer.nbytes for buffer in buffers())


@needs_grouped_mm
@pytest.mark.parametrize("transpose", [False, True])
def test_a_simulated_step_counts_the_decoded_experts(transpose: bool) -> None:
    small = simulated(Launches(True), LIBRARY_ROWS - 1, transpose)
    meter = Launches(True)
    large = simulated(meter, LIBRARY_ROWS, transpose)
    assert large - small == COUNT * OUT * IN * 2
    assert meter.kernels == ["dequantize_planar_kernel"]
    assert meter.flops == 2.0 * COUNT * LIBRARY_ROWS * OUT * IN


@pytest.mark.parametrize(("multiplies", "dtype"), [(False, torch.bfloat16), (True, torch.float16)])
def test_without_the_library_a_simulated_step_decodes_on_the_way(
    multiplies: bool, dtype: torch.dtype
) -> None:
    for transpose, kernel in ((False, "nf4_kernel"), (True, "nf4_transposed_kernel")):
        meter = Launches(multiplies)
        simulated(meter, LIBRARY_ROWS, transpose, dtype)
        assert meter.kernels == [kernel]
        assert meter.flops == 2.0 * COUNT * LIBRARY_ROWS * OUT * IN


@pytest.mark.parametrize(
    ("gpus", "counted"), [([], True), ([89], False), ([90], True), ([89, 90], True), ([100], False)]
)
def test_a_plan_counts_decoded_experts_where_a_gpu_of_the_machine_may_multiply_them(
    gpus: list[int], counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(grouped_library, "architecture", lambda device: gpus[device.index])
    config = TrainConfig(model="m", data="d", output_dir="o")
    assert step.assumed_gpu(config).multiplies_groups is counted


def mixture(golden: Callable[[str], Path], counts: dict[str, int]) -> ModelConfig:
    """A small mixture of experts with these counts."""
    values = json.loads((golden("qwen3_moe") / "config.json").read_text())
    del values["num_local_experts"]
    return ModelConfig.from_dict(values | counts)


def on_a_cpu(**changes: Any) -> TrainConfig:
    return TrainConfig(
        model="m", data="d", device="cpu", **{"gradient_checkpointing": "selective"} | changes
    )


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_of_equal_experts_some_stand_for_all(
    method: Any, golden: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = mixture(golden, {"num_experts": 37}), [make_batch([100, 37, 163])]
    config = on_a_cpu(method=method)

    def simulated_step() -> step.SimulatedStep:
        return step.simulate_step(model, config, batches, gpu=False, dtype=torch.float32)

    some = simulated_step()
    for user in ("kernels.moe.grouped_matmul", "models.tensor_layout"):
        monkeypatch.setattr(f"{user}.equal_parts_by", lambda size, parts: parts)
    assert some == simulated_step()


@pytest.mark.parametrize(
    "counts",
    [
        {"num_experts": 4096},
        {"num_experts": 4096, "num_experts_per_tok": 4096},
        {"num_hidden_layers": 1024, "num_experts": 64},
        {"num_attention_heads": 1024, "num_key_value_heads": 1024},
        {"vocab_size": 1 << 22},
        {"hidden_size": 1 << 16},
        {"moe_intermediate_size": 1 << 20},
        {"max_position_embeddings": 1 << 24},
    ],
    ids=lambda counts: "-".join(counts),
)
def test_the_largest_counts_are_planned_in_seconds(
    counts: dict[str, int], golden: Callable[[str], Path]
) -> None:
    model = mixture(golden, counts)
    begun = time.process_time()
    plan(model, on_a_cpu(), gpu=False, dtype=torch.float32, simulations=Simulations())
    assert time.process_time() - begun < 3.0
