"""Head pruning of SmolLM2: every metric, recovery, and a baseline.

SmolLM2-135M-Instruct (30 layers of 9 heads over 3 key/value heads) is pruned by each metric of
`engine prune` in mode zero. Each pruned model is written, read back and evaluated on held-out
docstrings of the installed Python. The models pruned by `activation` are then fine-tuned with LoRA,
as `engine forge` does it, and so is the model that was not pruned: the baseline, which tells how
much of the gain is the training's and not the recovery's.

Writes bench/results/prune_smollm2.{json,md}. Takes about half an hour on 2 cores; what was done
stays under --output-dir, and a second start goes on from there.

Run as ``python -m bench.prune_smollm2 [--output-dir runs/prune-smollm2] [--steps N]``.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from engine.config.choices import METRICS, Metric
from engine.config.tasks.pruning import ForgeSettings, PruneSettings
from engine.config.train_config import TrainConfig
from engine.forging.assess import Judge
from engine.forging.stages import Stages
from engine.storage import durable
from engine.verbs.models.forge import forge
from engine.verbs.models.prune import prune
from examples.smollm2 import gguf_path

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.1, 0.2, 0.3)
RECOVERED: Metric = "l2-output"
HELDOUT_ROWS = 64
MAX_LENGTH = 256


def settings_of(root: Path, fraction: float, steps: int, baseline: bool) -> ForgeSettings:
    """The forge of one fraction; its data and its baseline are those of every other."""
    training = TrainConfig(
        model=str(gguf_path()),
        data=["-"],
        method="lora",
        max_steps=steps,
        learning_rate=5e-4,
        max_length=MAX_LENGTH,
        checkpoint_every=20,
        device="cpu",
        seed=0,
        plot=False,
    )
    pruning = PruneSettings(
        fraction=fraction, metric=RECOVERED, device="cpu", max_length=MAX_LENGTH
    )
    return ForgeSettings(
        output_dir=root / f"forge-{fraction:g}",
        training=training,
        pruning=pruning,
        baseline=baseline,
        heldout_rows=HELDOUT_ROWS,
        samples=0,
        domain="docstrings",
    )


def pruned_perplexity(root: Path, metric: Any, fraction: float, data: Path, judge: Judge) -> Any:
    """Prune, read back, evaluate; the model is deleted again."""
    target = root / f"{metric}-{fraction:g}"
    shutil.rmtree(target, ignore_errors=True)
    settings = PruneSettings(
        fraction=fraction, metric=metric, data=(str(data),), device="cpu", max_length=MAX_LENGTH
    )
    record = prune(str(gguf_path()), target, settings).record
    result = judge.assess(target)
    shutil.rmtree(target)
    return {"perplexity": result["perplexity"], "heads": record["heads"]["removed"]}


def run(root: Path, steps: int) -> dict[str, Any]:
    forged = {
        fraction: forge(settings_of(root, fraction, steps, fraction == FRACTIONS[0]), resume=True)
        for fraction in FRACTIONS
    }
    folder = root / f"forge-{FRACTIONS[0]:g}" / "data"
    judge = Judge(folder / "heldout.jsonl", (), MAX_LENGTH, "cpu", "auto")
    job = Stages(root / "metrics", {"rows": HELDOUT_ROWS}, resume=True)
    pruned = {
        metric: {
            f"{fraction:g}": job.run(
                f"{metric}-{fraction:g}",
                lambda metric=metric, fraction=fraction: pruned_perplexity(  # type: ignore[misc]
                    root, metric, fraction, folder / "train.jsonl", judge
                ),
            )
            for fraction in FRACTIONS
        }
        for metric in METRICS
    }
    first = forged[FRACTIONS[0]]
    return {
        "baseline": first["baseline"]["perplexity"],
        "tokens": first["baseline"]["tokens"],
        "rows": HELDOUT_ROWS,
        "steps": steps,
        "pruned": pruned,
        "recovered": {
            f"{fraction:g}": results["cycles"][0]["trained"]["perplexity"]
            for fraction, results in forged.items()
        },
        "baseline_trained": first["baseline_cycles"][0]["trained"]["perplexity"],
    }


def markdown(results: dict[str, Any]) -> str:
    heads = results["pruned"][RECOVERED]
    columns = [f"{100 * fraction:.0f} %" for fraction in FRACTIONS]
    keys = [f"{fraction:g}" for fraction in FRACTIONS]
    counts = ", ".join(str(heads[key]["heads"]) for key in keys)
    lines = [
        "# Head pruning of SmolLM2-135M-Instruct",
        "",
        f"Perplexity on {results['rows']} held-out docstring rows "
        f"({results['tokens']} trained tokens)",
        f"of models read back from the disk. {counts} of 270 attention heads are pruned, in mode",
        "zero, ranked over all layers. Written by `python -m bench.prune_smollm2`.",
        "",
        f"| | 0 % | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for metric, cells in results["pruned"].items():
        values = " | ".join(f"{cells[key]['perplexity']:.2f}" for key in keys)
        lines.append(f"| pruned by {metric} | {results['baseline']:.2f} | {values} |")
    middle = {metric: cells[keys[1]]["perplexity"] for metric, cells in results["pruned"].items()}
    worse = [metric for metric, value in middle.items() if value > middle["random"]]
    values = " | ".join(f"{results['recovered'][key]:.2f}" for key in keys)
    lines += [
        f"| by {RECOVERED}, then {results['steps']} steps of LoRA "
        f"| {results['baseline_trained']:.2f} (baseline) | {values} |",
        "",
        "The baseline is the model that was not pruned after the same training: what pruning costs",
        "after recovery is the distance to it, not to the untrained model.",
        "",
        f"Worse than chance at {columns[1]}: {', '.join(worse) or 'none'}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_smollm2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune-smollm2"))
    parser.add_argument("--steps", type=int, default=60, help="of training, 4 rows each")
    given = parser.parse_args()
    results = run(given.output_dir, given.steps)
    RESULTS.mkdir(exist_ok=True)
    durable.write_json(RESULTS / "prune_smollm2.json", results)
    durable.write_text(RESULTS / "prune_smollm2.md", markdown(results))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
