"""Generation on the CPU beside transformers' `generate` and bitsandbytes.

Both sides read the same model (SmolLM2-135M-Instruct) and the same prompts of random tokens, and
make the same number of likeliest tokens. In 4 bits ours decodes its NF4 weights for every pass, or
once (``nf4-kept``, what ``engine generate --keep-decoded`` does); the peer is bitsandbytes' NF4.
The sides run in turn, each time in a fresh process, so that a change of the machine's load meets
both. Printed are medians over the rounds. One JSON row goes to bench/results/generation_cpu.jsonl.

Run as ``python -m bench.cpu.generation [--rounds N] [--tokens N] [--quick]``, in an environment
that has transformers and bitsandbytes. ``--quick`` takes a small model of random weights.
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
from pathlib import Path
from typing import Any

import torch

from bench.cpu.fresh_process import ROOT, result_of
from engine.provenance import device_name, git_commit
from examples.smollm2 import gguf_path

RESULTS = ROOT / "bench" / "results" / "generation_cpu.jsonl"
KINDS = {
    "bfloat16": ("bfloat16", False, False),
    "float32": ("float32", False, False),
    "nf4": ("bfloat16", True, False),
    "nf4-kept": ("bfloat16", True, True),
}
"""Compute type, whether weights are in 4 bits, and whether ours keeps them decoded."""

Key = tuple[str, int, str]
"""Kind, batch and side."""


def run_side(side: str, work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one side in a fresh process, outside this project's folder; what it measured."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("generation_side.py")), side]
    return result_of(side, command, work, folder, folder, environment)


def run_rounds(options: argparse.Namespace) -> dict[Key, list[dict[str, Any]]]:
    """Let both sides do the same work in turn, and print each result as it comes."""
    results: dict[Key, list[dict[str, Any]]] = {}
    draw = random.Random(options.seed)
    prompts = [[draw.randrange(3, 250) for _ in range(options.prompt)] for _ in range(8)]
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        folder = Path(name)
        work: dict[str, Any] = {
            "gguf": None if options.quick else str(gguf_path()),
            "directory": str(folder / "hf"),
            "tokens": options.tokens,
        }
        run_side("prepare", work, folder)
        for turn in range(options.rounds):
            for kind in options.kinds:
                dtype, four_bit, lasting = KINDS[kind]
                for batch in options.batches:
                    own = work | {"dtype": dtype, "four_bit": four_bit, "keep_decoded": lasting}
                    own["prompts"] = prompts[:batch]
                    for side in ("ours", "peers") if turn % 2 == 0 else ("peers", "ours"):
                        result = run_side(side, own, folder)
                        results.setdefault((kind, batch, side), []).append(result)
                        print(
                            f"round {turn + 1}  {kind:<9} batch {batch}  {side:<6}"
                            f"{result['tokens_per_second']:8.1f} tokens/s  first token after "
                            f"{result['first_token_seconds']:.3f} s  processor "
                            f"{result['cpu_ms_per_token']:.1f} ms a token",
                            flush=True,
                        )
    return results


def same_start(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of tokens that are the same before the first that differs."""
    same = 0
    for own, other in zip(mine, theirs, strict=True):
        pairs = enumerate(zip(own, other, strict=True))
        same += next((index for index, (a, b) in pairs if a != b), len(own))
    return same / sum(len(own) for own in mine)


def summary(results: dict[Key, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians of every kind and batch, and how ours compares."""
    rows = []
    measures = ("tokens_per_second", "first_token_seconds", "cpu_ms_per_token")
    for kind, batch in dict.fromkeys(key[:2] for key in results):
        sides = {side: results[kind, batch, side] for side in ("ours", "peers")}
        row: dict[str, Any] = {"kind": kind, "batch": batch}
        for side, rounds in sides.items():
            row[side] = {m: statistics.median(r[m] for r in rounds) for m in measures}
        row["our_speed_ratio"] = (
            row["ours"]["tokens_per_second"] / row["peers"]["tokens_per_second"]
        )
        row["same_start"] = same_start(sides["ours"][0]["tokens"], sides["peers"][0]["tokens"])
        row["versions"] = sides["peers"][0]["versions"]
        row["threads"] = {side: rounds[0]["threads"] for side, rounds in sides.items()}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.generation", description="Time generation.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=0, help="which prompts are drawn")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", nargs="+", type=int, choices=range(1, 9), default=[1, 8])
    parser.add_argument("--quick", action="store_true", help="a small model of random weights")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that gets the row")
    options = parser.parse_args(arguments)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if load > cores / 2:
        print(f"Other programs keep this machine busy (load {load:.1f} on {cores} cores): the")
        print("figures below say little about an idle one.")
    results = run_rounds(options)
    rows = summary(results)
    for row in rows:
        print(
            f"{row['kind']:<9} batch {row['batch']}: ours / theirs {row['our_speed_ratio']:.2f}, "
            f"same tokens at the start {row['same_start']:.0%}"
        )
    line = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "cores": cores,
        "load_average_before": load,
        "python": platform.python_version(),
        "model": "random" if options.quick else gguf_path().name,
        "tokens": options.tokens,
        "prompt": options.prompt,
        "rounds": options.rounds,
        "medians": rows,
    }
    options.results.parent.mkdir(exist_ok=True)
    with options.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"One row added to {options.results}")


if __name__ == "__main__":
    main()
