"""Estimates for 8, 64 and 512 GPUs: memory, bytes, time, never measured.

    python -m bench.clusters [--results bench/results/clusters.jsonl]    # some minutes on a CPU

Rows grow with the GPUs (weak scaling), but for `fixed`, whose step is that of 8 GPUs. Each line is
the fastest arrangement that fits, as `engine plan --gpus` has it. `--table` prints the lines of a
file as docs/distributed.md shows them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
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
NETWORK = "100Gbit"
MILLION = 1_000_000


@dataclass(frozen=True)
class Case:
    """QLoRA of a model on rows of so many tokens, `rows` of them a step on eight GPUs."""

    model: str
    tokens: int = 2048
    rows: int = 32
    fixed: bool = False


CASES = (
    Case("llama-3.1-8b"),
    Case("llama-3.1-8b", fixed=True),
    Case("llama-3.3-70b"),
    Case("qwen3-235b-a22b"),
    Case("llama-3.1-8b", MILLION, 1),
    Case("llama-3.1-8b", MILLION, 1, fixed=True),
)


def estimate(case: Case, size: int) -> dict[str, Any]:
    """One line: QLoRA of rank 16 on `size` GPUs of 80 GiB, eight in a machine."""
    model = preset_config(case.model)
    assert model is not None
    rate = GPU_TFLOPS["a100"] * 1e12
    cluster = Cluster(8, 80 * 2**30, rate, link_of("nvlink3"), size // 8, network_of(NETWORK))
    rows = case.rows if case.fixed else case.rows * size // 8
    config = TrainConfig(
        model="m", data="d", max_length=case.tokens, batch_size=1, accumulate=rows, lora_dropout=0.0
    )
    best = rank_arrangements(model, config, cluster, torch.bfloat16, torch.bfloat16)[0]
    return {
        "kind": "estimate, not measured",
        "model": case.model,
        "tokens_per_row": case.tokens,
        "gpus": size,
        "rows_per_step": rows,
        "fixed": case.fixed,
        "gpu": "a100",
        "link": "nvlink3",
        "network": NETWORK,
        **best.as_dict(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a table of docs/distributed.md."""
    rows = [
        "| model | tokens a row | GPUs | rows a step | fastest that fits | memory of each "
        "| sent by each | a step | tokens/s | of N times one |",
        "|---|--:|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        begin = (
            f"| {line['model']} | {line['tokens_per_row']:,} | {line['gpus']} "
            f"| {line['rows_per_step']:,} "
        )
        if not line["fits"]:
            rows.append(f"{begin}| none: {line['why_not']} | | | | | |")
            continue
        policy = line["settings"]["gradient_checkpointing"]
        sent = sum(line["bytes_sent"].values()) / 2**20
        rows.append(
            f"{begin}| {line['options']}, {policy} | {line['memory_bytes'] / 2**30:.1f} GiB "
            f"| {sent:,.0f} MiB | {line['seconds_per_step']:.3g} s "
            f"| {line['tokens_per_second']:,.0f} | {100 * line['efficiency']:.0f} % |"
        )
    return "\n".join(rows)


def main() -> None:
    """Write all lines, or print those that were written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results/clusters.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the file as a table")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.results.read_text().splitlines()]))
        return
    lines = []
    for case in CASES:
        for size in SIZES:
            lines.append(json.dumps(estimate(case, size)))
            print(lines[-1], flush=True)
    durable.write_text(options.results, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
