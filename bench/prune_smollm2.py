"""Head pruning of SmolLM2: every metric, repair, recovery, and a baseline.

SmolLM2-135M-Instruct (30 layers of 9 heads over 3 key/value heads) is pruned by each metric of
`engine prune` in mode zero, chance with five seeds. Each pruned model is written, read back and
evaluated on held-out docstrings of the installed Python; calibration rows are others. Intervals are
the middle 95 % of draws of the held-out rows. The models pruned by `l2-reconstruction` and repaired
are then fine-tuned with LoRA, as `engine forge` does it, and so is the model that was not pruned:
the baseline, which tells how much of the gain is the training's and not the recovery's.

Writes bench/results/prune_smollm2.{json,md}. Takes an hour or more on 2 cores; what was done stays
under --output-dir, and a second start goes on from there. `--only l2-reconstruction` measures some
rows of the table; a row without figures is left out of it.

Run as ``python -m bench.prune_smollm2 [--output-dir runs/prune-smollm2] [--steps N]``.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.choices import METRICS_OF, Metric, RepairMethod
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
RECOVERED: Metric = "l2-reconstruction"
HELDOUT_ROWS = 64
MAX_LENGTH = 256
SEEDS = range(5)


@dataclass(frozen=True)
class Row:
    """A row of the table: how heads are chosen, whether the rest is repaired, the seed."""

    metric: Metric
    repair: RepairMethod = "none"
    seed: int = 0

    @property
    def name(self) -> str:
        """Its key in the results."""
        repaired = "-repaired" if self.repair == "least-squares" else ""
        return f"{self.metric}{repaired}" + (f"-{self.seed}" if self.metric == "random" else "")


ROWS = (
    Row("l2-reconstruction", "least-squares"),
    Row("l2-output", "least-squares"),
    *(Row(metric) for metric in METRICS_OF["heads"] if metric != "random"),
    *(Row("random", seed=seed) for seed in SEEDS),
)


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


def pruned_perplexity(
    root: Path, row: Row, fraction: float, data: Path, judge: Judge
) -> dict[str, Any]:
    """Prune, read back, evaluate; the model is deleted again."""
    target = root / f"{row.name}-{fraction:g}"
    shutil.rmtree(target, ignore_errors=True)
    settings = PruneSettings(
        fraction=fraction,
        metric=row.metric,
        repair=row.repair,
        seed=row.seed,
        data=(str(data),),
        device="cpu",
        max_length=MAX_LENGTH,
    )
    record = prune(str(gguf_path()), target, settings).record
    result = judge.assess(target)
    shutil.rmtree(target)
    figures = {name: result[name] for name in ("perplexity", "interval", "tokens")}
    return figures | {"heads": record["heads"]["removed"], "scope": record["scope"]}


def run(root: Path, steps: int, only: list[str]) -> dict[str, Any]:
    """Every row that is asked for, then the recovery. What was done before is read."""
    forged = {
        fraction: forge(settings_of(root, fraction, steps, fraction == FRACTIONS[0]), resume=True)
        for fraction in (FRACTIONS if not only else ())
    }
    first = settings_of(root, FRACTIONS[0], steps, True)
    folder = first.output_dir / "data"
    if not folder.exists():
        forge_data(root)
        folder = root / "data"
    judge = Judge(folder / "heldout.jsonl", (), MAX_LENGTH, "cpu", "auto")
    job = Stages(root / "metrics", {"rows": HELDOUT_ROWS}, resume=True)
    pruned = {
        row.name: {
            f"{fraction:g}": job.run(
                f"{row.name}-{fraction:g}",
                lambda row=row, fraction=fraction: pruned_perplexity(  # type: ignore[misc]
                    root, row, fraction, folder / "train.jsonl", judge
                ),
            )
            for fraction in FRACTIONS
        }
        for row in ROWS
        if not only or row.name in only or row.metric in only
    }
    whole = job.run("whole", lambda: judge.assess(str(gguf_path())))
    results: dict[str, Any] = {
        "baseline": whole["perplexity"],
        "interval": whole["interval"],
        "tokens": whole["tokens"],
        "rows": HELDOUT_ROWS,
        "pruned": pruned,
    }
    if not forged:
        return results
    trained = forged[FRACTIONS[0]]["baseline_cycles"][0]["trained"]
    return results | {
        "steps": steps,
        "recovered": {
            f"{fraction:g}": one["cycles"][0]["trained"]["perplexity"]
            for fraction, one in forged.items()
        },
        "baseline_trained": trained["perplexity"],
    }


def forge_data(root: Path) -> None:
    """The rows that a job of forge would write, for a table without recovery."""
    from engine.data.docstrings import write_docstrings

    write_docstrings(root / "data")
    rows = (root / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    durable.write_text(root / "data" / "heldout.jsonl", "".join(rows[:HELDOUT_ROWS]))


def markdown(results: dict[str, Any]) -> str:
    columns = [f"{100 * fraction:.0f} %" for fraction in FRACTIONS]
    keys = [f"{fraction:g}" for fraction in FRACTIONS]
    whole = f"{results['baseline']:.2f} ({_between(results['interval'])})"
    lines = [
        "# Head pruning of SmolLM2-135M-Instruct",
        "",
        f"Perplexity on {results['rows']} held-out docstring rows "
        f"({results['tokens']} trained tokens)",
        "of models read back from the disk, in brackets the middle 95 % of draws of the rows. 27,",
        "54 and 81 of 270 attention heads are pruned, in mode zero. Calibration on 64 other rows.",
        "Written by `python -m bench.prune_smollm2`.",
        "",
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        f"| whole | {' | '.join([whole] * len(columns))} |",
    ]
    for name, cells in results["pruned"].items():
        values = " | ".join(
            f"{cells[key]['perplexity']:.2f} ({_between(cells[key]['interval'])})" for key in keys
        )
        lines.append(f"| {name} | {values} |")
    if "recovered" in results:
        values = " | ".join(f"{results['recovered'][key]:.2f}" for key in keys)
        lines += [
            f"| {RECOVERED}-repaired, then {results['steps']} steps of LoRA | {values} |",
            "",
            f"The model that was not pruned has {results['baseline_trained']:.2f} after the same",
            "training: what pruning costs after recovery is the distance to it.",
        ]
    return "\n".join([*lines, ""])


def _between(interval: list[float]) -> str:
    return " - ".join(f"{value:.1f}" for value in interval)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_smollm2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune-smollm2"))
    parser.add_argument("--steps", type=int, default=60, help="of training, 4 rows each")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table, no recovery")
    given = parser.parse_args()
    results = run(given.output_dir, given.steps, given.only)
    if given.only:
        print(markdown(results))
        return
    RESULTS.mkdir(exist_ok=True)
    durable.write_json(RESULTS / "prune_smollm2.json", results)
    durable.write_text(RESULTS / "prune_smollm2.md", markdown(results))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
