"""A QLoRA step on the CPU beside transformers, PEFT and bitsandbytes.

Every side gets the same model (SmolLM2-135M-Instruct), the same rows (docstrings of the installed
Python, tokenised once), the same batches of four ragged rows and the same settings: NF4 with double
quantisation, LoRA of rank 16 and alpha 32 on all seven projections, AdamW with 8-bit moments. The
sides are

    ours              rows end to end, no padding; recomputes only what does not fit in memory; in
                      the compute type that `--dtype auto` chooses for this processor
    ours-fp32         the same in fp32, in which the peers compute
    ours-selective    as ours, but recomputes what costs little and frees much
    peers             rows padded to the longest of the batch: what these libraries do by default
    peers-flattened   rows end to end with position ids, as DataCollatorWithFlattening builds them

The peers checkpoint their layers, as QLoRA with them does.

They run in turn, round after round, each time in a fresh process, so that a change of the machine's
clock or load meets all of them. Printed are real tokens per second (padding is never counted), how
the sides compare by the clock and by the processor's time, which a busy machine changes less, and
the peak resident memory of the process, loading included, all as the median over the rounds.
One JSON row goes to bench/results/train_step_cpu.jsonl.

Run as ``python -m bench.cpu.train_step [--rounds N] [--steps N]``.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cpu.fresh_process import ROOT, result_of
from bench.cpu.side import Result, Row, Work
from engine.provenance import device_name, git_commit
from examples.smollm2 import gguf_path

RESULTS = ROOT / "bench" / "results" / "train_step_cpu.jsonl"
SIDES = {
    "ours": "bench.cpu.train_step_ours",
    "ours-fp32": "bench.cpu.train_step_ours",
    "ours-selective": "bench.cpu.train_step_ours",
    "peers": "bench.cpu.train_step_peers",
    "peers-flattened": "bench.cpu.train_step_peers",
}
BATCH_ROWS = 4
MAX_LENGTH = 512


def docstring_rows(gguf: Path, count: int, seed: int) -> list[Row]:
    """Tokenise ``count`` prompt/response pairs made of the standard library's docstrings."""
    from engine.data.docstrings import docstring_pairs
    from engine.data.examples import build_examples
    from engine.model_sources.open import open_model_source
    from engine.tokenization.tokenizer import load_tokenizer

    pairs = docstring_pairs()
    random.Random(seed).shuffle(pairs)
    tokenizer = load_tokenizer(open_model_source(gguf))
    examples, _ = build_examples(pairs[:count], tokenizer, MAX_LENGTH)
    return [
        Row(
            example.input_ids,
            [
                token if trained else -100
                for token, trained in zip(example.input_ids, example.trained, strict=True)
            ],
        )
        for example in examples
    ]


def run_side(side: str, work: Work, folder: Path) -> Result | None:
    """Run one side in a fresh process. Returns None where the process only prepared something."""
    result = result_of(side, [sys.executable, "-m", SIDES[side]], asdict(work), folder)
    return Result(**result) if result else None


def summary(results: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Medians per side, and how ``ours`` compares with it."""
    medians: dict[str, dict[str, Any]] = {
        side: {
            "tokens_per_second": statistics.median(r.tokens_per_second for r in rounds),
            "tokens_per_cpu_second": statistics.median(r.tokens_per_cpu_second for r in rounds),
            "peak_bytes": statistics.median(r.peak_bytes for r in rounds),
            "loaded_peak_bytes": statistics.median(r.loaded_peak_bytes for r in rounds),
            "first_loss": rounds[0].losses[0],
            "last_loss": rounds[0].losses[-1],
            "versions": rounds[0].versions,
        }
        for side, rounds in results.items()
    }
    ours = medians.get("ours")
    for side, row in medians.items():
        if ours is not None and side != "ours":
            row["our_speed_ratio"] = ours["tokens_per_second"] / row["tokens_per_second"]
            row["our_cpu_ratio"] = ours["tokens_per_cpu_second"] / row["tokens_per_cpu_second"]
            row["our_memory_ratio"] = ours["peak_bytes"] / row["peak_bytes"]
    return medians


def show(console: Console, medians: dict[str, dict[str, Any]]) -> None:
    table = Table(title="QLoRA step, SmolLM2-135M, CPU: medians over the rounds")
    table.add_column("side", no_wrap=True)
    for heading in (
        *("tokens/s", "ours / it", "CPU: ours / it", "peak GiB", "ours / it"),
        *("first loss", "last loss"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for side, row in medians.items():
        speed, memory = row.get("our_speed_ratio"), row.get("our_memory_ratio")
        table.add_row(
            side,
            f"{row['tokens_per_second']:.1f}",
            "" if speed is None else f"{speed:.2f}",
            "" if speed is None else f"{row['our_cpu_ratio']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            "" if memory is None else f"{memory:.2f}",
            f"{row['first_loss']:.4f}",
            f"{row['last_loss']:.4f}",
        )
    console.print(table)


def run_rounds(options: argparse.Namespace, rows: list[Row]) -> dict[str, list[Result]]:
    """Let every side do the same work in turn, and print each result as it comes."""
    results: dict[str, list[Result]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        folder = Path(name)
        work = Work(
            gguf=str(gguf_path()),
            hf_directory=str(folder / "hf"),
            rank=16,
            alpha=32,
            learning_rate=2e-4,
            warmup=options.warmup,
            flattened=False,
            policy="auto",
            dtype="auto",
            batches=[rows[i : i + BATCH_ROWS] for i in range(0, len(rows), BATCH_ROWS)],
        )
        for turn in range(options.rounds):
            for side in options.sides:
                own = replace(
                    work,
                    flattened=side == "peers-flattened",
                    policy="selective" if side == "ours-selective" else "auto",
                    dtype="float32" if side == "ours-fp32" else "auto",
                )
                # The first process of the peers only writes the Hugging Face directory.
                result = run_side(side, own, folder) or run_side(side, own, folder)
                if result is None:
                    raise SystemExit(f"{side} wrote no result")
                results[side].append(result)
                print(
                    f"round {turn + 1}  {side:<16} {result.tokens_per_second:7.1f} tokens/s  "
                    f"peak {result.peak_bytes / 2**30:.2f} GiB",
                    flush=True,
                )
    return results


def require_same_work(results: dict[str, list[Result]]) -> None:
    """Refuse to compare sides whose loss on the first batch differs: they did different work."""
    first = {side: rounds[0].losses[0] for side, rounds in results.items()}
    if max(first.values()) - min(first.values()) > 0.01:
        raise SystemExit(f"the sides disagree on the loss of the first batch: {first}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.train_step", description="Time a QLoRA step.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args(arguments)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores / 2:
        print(f"Other programs keep this machine busy (load {load:.1f} on {cores} cores): the")
        print("figures below say little about an idle one.")
    steps = options.warmup + options.steps
    rows = docstring_rows(gguf_path(), steps * BATCH_ROWS, options.seed)
    results = run_rounds(options, rows)
    require_same_work(results)
    medians = summary(results)
    show(Console(), medians)
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "cores": cores,
        "load_average_before": load,
        "python": platform.python_version(),
        "row_lengths": [len(row.input_ids) for row in rows],
        "warmup": options.warmup,
        "medians": medians,
        "rounds": {side: [asdict(result) for result in rounds] for side, rounds in results.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"One row added to {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
