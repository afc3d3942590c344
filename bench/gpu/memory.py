"""Planned bytes of known models, and what a GPU really allocates.

    python -m bench.gpu.memory                        # plans: 2,048 tokens and the slope per token
    python -m bench.gpu.memory --measure qwen3-0.6b   # needs CUDA: random weights, plan beside
    reality

Without a GPU every figure is a plan and says so. With one, `--gpu-gib` lets the allocator play a
smaller GPU.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from engine.config.choices import POLICIES
from engine.config.train_config import TrainConfig
from engine.memory.estimate import make_batch, plan
from engine.memory.model_shapes import preset_config
from engine.selfcheck.steps import build_step
from models.config.model_config import ModelConfig

MODELS = ("llama-3.1-8b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "llama-3.3-70b")


def shape_of(name: str) -> ModelConfig:
    """The preset's configuration. Raises `SystemExit` where there is none."""
    config = preset_config(name)
    if config is None:
        raise SystemExit(f"no preset {name!r}")
    return config


def settings(tokens: int, policy: str) -> TrainConfig:
    """QLoRA of rank 16 on one row."""
    return TrainConfig(
        model="-", data="-", batch_size=1, max_length=tokens, gradient_checkpointing=policy
    )


def planned(name: str, policy: str) -> dict[str, Any]:
    """One line: planned bytes at 2,048 tokens, and bytes per token from there to 16,384."""
    model = shape_of(name)
    short, long = (
        plan(model, settings(tokens, policy), gpu=True, dtype=torch.bfloat16)
        for tokens in (2048, 16384)
    )
    return {
        "kind": "plan, not measured",
        "model": name,
        "recompute": policy,
        "tokens": 2048,
        "allocated_bytes": short.step.bytes,
        "bytes_per_token": (long.step.bytes - short.step.bytes) / (16384 - 2048),
        "owners": {owner: size for owner, size in short.step.owners.items() if size},
        "torch": torch.__version__,
    }


def measured(name: str, policy: str, tokens: int) -> dict[str, Any]:
    """One line: planned and allocated bytes of the third of three real steps."""
    shape, config = shape_of(name), settings(tokens, policy)
    gpu = torch.device("cuda")
    step = build_step(shape, config, gpu, torch.bfloat16, weights_on=gpu)
    for number in range(3):
        torch.cuda.reset_peak_memory_stats()
        step([make_batch([tokens])], number)
    made = plan(shape, config, gpu=True, dtype=torch.bfloat16)
    real = torch.cuda.max_memory_allocated()
    return {
        "kind": "measured",
        "model": name,
        "recompute": policy,
        "tokens": tokens,
        "planned_bytes": made.step.bytes,
        "allocated_bytes": real,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "error": made.step.bytes / real - 1,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Print one JSON line per model and checkpointing policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="PRESET")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--gpu-gib", type=float)
    options = parser.parse_args()
    if options.measure is None:
        for name in MODELS:
            for policy in POLICIES:
                print(json.dumps(planned(name, policy)), flush=True)
        return
    if not torch.cuda.is_available():
        raise SystemExit("--measure needs a CUDA GPU")
    if options.gpu_gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.gpu_gib * 2**30 / whole)
    for policy in POLICIES:
        print(json.dumps(measured(options.measure, policy, options.tokens)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
