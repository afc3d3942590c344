"""Preference tuning (DPO) on the CPU beside TRL, PEFT and bitsandbytes.

Every side gets the same model (SmolLM2-135M-Instruct in NF4), the same pairs (a function's
docstring and another function's, tokenised once), the same batches of four ragged pairs and the
same settings. The sides are

    ours          answers end to end, no padding; the reference measured before the steps
    ours-shared   the same with --share-prompt: a pair's prompt is computed once
    trl           TRL's DPOTrainer, sequences padded to the longest of a batch

They run in turn, each time in a fresh process. Printed are pairs per second, the reference's time
included, and the peak resident memory of the process, both as medians over the rounds. One JSON row
goes to bench/results/preference_cpu.jsonl.

Run as ``python -m bench.cpu.preference [--rounds N] [--steps N]`` where TRL is installed.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.cpu.fresh_process import ROOT, result_of
from bench.preference_smollm2 import preference_rows
from engine.provenance import device_name, git_commit
from examples.smollm2 import gguf_path

RESULTS = ROOT / "bench" / "results" / "preference_cpu.jsonl"
SIDES = ("ours", "ours-shared", "trl")
PAIRS, MAX_LENGTH = 4, 256


def tokenised_pairs(count: int) -> list[dict[str, list[int]]]:
    """Pairs of docstrings as ids of prompt, chosen and rejected answer."""
    from engine.data.examples import ExampleSettings
    from engine.data.preferences import pair_examples
    from engine.data.rows import parse_row
    from engine.model_sources.open import open_model_source
    from engine.tokenization.tokenizer import load_tokenizer

    rows = [parse_row(row, "docstrings", n) for n, row in enumerate(preference_rows(count))]
    tokenizer = load_tokenizer(open_model_source(gguf_path()))
    examples, _ = pair_examples(rows, tokenizer, ExampleSettings(MAX_LENGTH))
    pairs = []
    for example in examples:
        (chosen, marks), (rejected, other) = example.parts()
        start, begin = int(marks.argmax()), int(other.argmax())
        pairs.append(
            {
                "prompt_ids": chosen[:start].tolist(),
                "chosen_ids": chosen[start:].tolist(),
                "rejected_ids": rejected[begin:].tolist(),
            }
        )
    return pairs


def run_side(side: str, work: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one side in a fresh process; what it measured, empty where it only prepared something."""
    return result_of(side, [sys.executable, "-m", "bench.cpu.preference_side", side], work, folder)


def medians_of(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Median speed and memory of every side, and TRL's against ours."""
    medians: dict[str, dict[str, Any]] = {
        side: {
            "pairs_per_second": statistics.median(r["pairs"] / r["seconds"] for r in results),
            "peak_bytes": statistics.median(r["peak_bytes"] for r in results),
            "first_loss": results[0]["losses"][0],
            "last_loss": results[0]["losses"][-1],
            "dtype": results[0]["dtype"],
            "versions": results[0]["versions"],
        }
        for side, results in rounds.items()
    }
    trl = medians.get("trl")
    for side, row in medians.items():
        if trl is not None and side != "trl":
            row["speed_against_trl"] = row["pairs_per_second"] / trl["pairs_per_second"]
            row["memory_against_trl"] = row["peak_bytes"] / trl["peak_bytes"]
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu.preference")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--policy", default="selective", help="what our backward recomputes")
    parser.add_argument("--peer-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    load = os.getloadavg()[0]
    pairs = tokenised_pairs((options.warmup + options.steps) * PAIRS)
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as name:
        folder = Path(name)
        work = {
            "gguf": str(gguf_path()),
            "hf_directory": str(folder / "hf"),
            "rank": 16,
            "alpha": 32,
            "learning_rate": 2e-4,
            "warmup": options.warmup,
            "policy": options.policy,
            "checkpointing": options.peer_checkpointing,
            "max_length": MAX_LENGTH,
            "batches": [pairs[i : i + PAIRS] for i in range(0, len(pairs), PAIRS)],
        }
        if "trl" in options.sides:
            run_side("convert", work, folder)
        for turn in range(options.rounds):
            for side in options.sides:
                result = run_side(side, work, folder)
                rounds[side].append(result)
                print(
                    f"round {turn + 1}  {side:<12} {result['pairs'] / result['seconds']:6.3f} "
                    f"pairs/s  peak {result['peak_bytes'] / 2**30:.2f} GiB  "
                    f"losses {result['losses'][0]:.4f} {result['losses'][-1]:.4f}",
                    flush=True,
                )
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": load,
        "policy": options.policy,
        "peer_checkpointing": options.peer_checkpointing,
        "tokens": sum(len(ids) for pair in pairs for ids in pair.values()),
        "medians": medians_of(rounds),
        "rounds": rounds,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    for side, median in row["medians"].items():
        print(side, {key: value for key, value in median.items() if key != "versions"})


if __name__ == "__main__":
    main()
