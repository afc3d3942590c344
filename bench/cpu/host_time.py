"""Host time per layer of a training step, without a GPU.

    python -m bench.cpu.host_time [--policy none|selective|full] [--steps 200]

A QLoRA step runs on the code for GPUs with tiny tensors on a CPU; Triton kernels are prepared and
not launched. The difference between a model of 6 layers and one of 2 is what a layer costs the
host: Python, torch's dispatch and its small products. A launch by Triton or CUDA itself comes on
top. Times are the processor's, the lowest of all steps: other programs only ever add to them.
Beside milliseconds stands the number of `torch.empty` calls that take as long, which another
machine, or a busy one, changes little.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

# Read when kernels are defined: without a GPU they need the interpreter, which is never called.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["ENGINE_INTERPRET"] = "1"

import torch
from torch import Tensor

from engine.benchmark.cases.random_weights import random_decoder
from engine.training.step import TrainingStep
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import to_planar
from kernels.runtime.simulation import SimulatedGPU, nothing, simulate_with
from models.config.model_config import ModelConfig
from models.layers.context import StepSettings
from models.layers.linear import Linear
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

FEW, MANY, TOKENS = 2, 6, 48


class NoLaunches:
    """Stands in for the machine only where a Triton kernel would be launched."""

    gpu: SimulatedGPU | None = None

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        """Nothing is launched."""
        return nothing

    def once(self, key: Hashable, run: Callable[[], Any], result: Callable[[], Any]) -> Any:
        """Every op runs."""
        return run()

    def some(self, parts: Sequence[Any]) -> Iterator[Any]:
        """All parts."""
        return iter(parts)

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype, taken: int = 0) -> Tensor:
        """An ordinary tensor."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def stays_on_host(self, tensor: Tensor) -> None:
        """Nothing is counted."""

    def shapes_only(self) -> AbstractContextManager[Any]:
        """Nothing is counted."""
        return nullcontext()


def _step(layers: int, policy: str) -> Callable[[], object]:
    config = ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64,
        }
    )
    model = random_decoder(config, torch.device("cpu"), torch.float32, rank=16)
    for module in model.modules():
        if isinstance(module, Linear) and isinstance(module.weight, NF4Weight):
            module.set_weight(to_planar(module.weight))
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = TrainingStep(model, optimizer, StepSettings(checkpointing=policy), max_grad_norm=1.0)
    ids = torch.randint(0, 96, (1, TOKENS))
    batch = PackedBatch.of(ids, ids)
    return lambda: step([batch])


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _allocations() -> None:
    for _ in range(1000):
        torch.empty(8)


def measure(policy: str, steps: int) -> tuple[float, float]:
    """Seconds of the host per layer, forward and backward, and per call of `torch.empty`."""
    few, many = _step(FEW, policy), _step(MANY, policy)
    times: dict[Callable[[], object], list[float]] = {few: [], many: [], _allocations: []}
    with simulate_with(NoLaunches()):
        for _ in range(5):
            few()
            many()
        for _ in range(steps):
            for run, seconds in times.items():
                seconds.append(_seconds(run))
    per_layer = (min(times[many]) - min(times[few])) / (MANY - FEW)
    return per_layer, min(times[_allocations]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    per_layer, call = measure(given.policy, given.steps)
    print(f"{per_layer * 1e3:.2f} ms per layer, as {per_layer / call:.0f} calls of torch.empty")


if __name__ == "__main__":
    main()
