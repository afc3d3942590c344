"""Estimates for 8, 64 and 512 GPUs: memory, bytes, time, never measured.

    python -m bench.clusters [--results bench/results/clusters.jsonl]    # some minutes on a CPU

Rows grow with the GPUs (weak scaling: four a GPU and step), but for `fixed`, whose step is that of
8 GPUs. Each line is the fastest arrangement that fits, as `engine plan --gpus` has it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from engine.clusters.hardware import Cluster, link_of, network_of
from engine.clusters.ranking import rank_arrangements
from engine.config.choices import GPU_TFLOPS
from engine.config.train_config import TrainConfig
from engine.memory.model_shapes import preset_config
from engine.storage import durable

SIZES = (8, 64, 512)
CASES: tuple[tuple[str, int, bool], ...] = (
    ("llama-3.1-8b", 2048, False),
    ("llama-3.1-8b", 2048, True),
    ("llama-3.3-70b", 2048, False),
)
NETWORK = "100Gbit"


def estimate(name: str, tokens: int, fixed: bool, size: int) -> dict[str, Any]:
    """One line: QLoRA of rank 16 on `size` GPUs of 80 GiB, eight in a machine."""
    model = preset_config(name)
    assert model is not None
    rate = GPU_TFLOPS["a100"] * 1e12
    machines = size // 8
    cluster = Cluster(8, 80 * 2**30, rate, link_of("nvlink3"), machines, network_of(NETWORK))
    rows = 4 * (8 if fixed else size)
    config = TrainConfig(
        model="m", data="d", max_length=tokens, batch_size=1, accumulate=rows, lora_dropout=0.0
    )
    best = rank_arrangements(model, config, cluster, torch.bfloat16, torch.bfloat16)[0]
    facts = {"kind": "estimate, not measured", "model": name, "tokens_per_row": tokens}
    return facts | {
        "gpus": size,
        "rows_per_step": rows,
        "fixed": fixed,
        "gpu": "a100",
        "link": "nvlink3",
        "network": NETWORK,
        **best.as_dict(),
    }


def main() -> None:
    """Write all lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results/clusters.jsonl"))
    lines = []
    results = parser.parse_args().results
    for name, tokens, fixed in CASES:
        for size in SIZES:
            lines.append(json.dumps(estimate(name, tokens, fixed, size)))
            print(lines[-1], flush=True)
    durable.write_text(results, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
