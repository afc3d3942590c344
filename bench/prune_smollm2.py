"""Head pruning of SmolLM2: every metric, repair, recovery, and a baseline.

SmolLM2-135M-Instruct (30 layers of 9 heads over 3 key/value heads) is pruned by each metric of
`engine prune` in mode zero, chance with five seeds. Each pruned model is written, read back and
evaluated on held-out docstrings of the installed Python; calibration rows are others. Intervals are
the middle 95 % of draws of the held-out rows. The models pruned by `l2-reconstruction` and repaired
are then fine-tuned with LoRA, as `engine forge` does it, and so is the model that was not pruned:
the baseline, which tells how much of the gain is the training's and not the recovery's.

Every cell of the table is a line of bench/results/prune_smollm2.jsonl, written when it is measured;
a second start measures what is missing. prune_smollm2.md is made of these lines alone. All of it
takes hours on 2 cores; `--only l2-output random` measures some rows of the table.

With ``--model FOLDER --name NAME`` another model is measured by the same rows, into
bench/results/prune_NAME.jsonl: whether what is true of SmolLM2 is true of it too. It is not
fine-tuned, and norms of weights are also ranked layer by layer, as their largest are.

Run as ``python -m bench.prune_smollm2 [--output-dir runs/prune-smollm2] [--only ROW ...]``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config.choices import METRICS_OF, Metric, RepairMethod, Scope
from engine.config.tasks.pruning import ForgeSettings, PruneSettings
from engine.config.train_config import TrainConfig
from engine.data.docstrings import write_docstrings
from engine.forging.assess import Judge
from engine.provenance import measured_on
from engine.pruning.scores import LayerScores
from engine.storage import durable
from engine.verbs.models.forge import forge
from engine.verbs.models.prune import prune
from examples.smollm2 import gguf_path

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.1, 0.2, 0.3)
RECOVERED: Metric = "l2-reconstruction"
HELDOUT_ROWS = 64
MAX_LENGTH = 256
STEPS = 60
SEEDS = range(5)
WHOLE = "whole"
Line = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: how heads are chosen, whether the rest is repaired, the seed."""

    metric: Metric
    repair: RepairMethod = "none"
    seed: int = 0
    scope: Scope | None = None

    @property
    def name(self) -> str:
        """Its key in the results."""
        parts = (self.metric, self.scope, "repaired" if self.repair == "least-squares" else None)
        name = "-".join(part for part in parts if part is not None)
        return f"{name}-{self.seed}" if self.metric == "random" else name

    def settings(self, fraction: float, data: Path) -> PruneSettings:
        """What `engine prune` is asked for."""
        return PruneSettings(
            fraction=fraction,
            metric=self.metric,
            scope=self.scope,
            repair=self.repair,
            seed=self.seed,
            data=(str(data),),
            device="cpu",
            max_length=MAX_LENGTH,
        )


ROWS = (
    Row("l2-reconstruction", "least-squares"),
    Row("l2-reconstruction", "least-squares", scope="global"),
    Row("l2-output", "least-squares"),
    *(Row(metric) for metric in METRICS_OF["heads"] if metric != "random"),
    *(Row("random", seed=seed) for seed in SEEDS),
)
OTHER_ROWS = (*ROWS, Row("l2-weights", scope="layer"))
"""Of another model."""


class Lines:
    """The lines of a file of measurements, one for each cell of a table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[Line] = [json.loads(line) for line in text.splitlines()]

    def cell(self, row: str, fraction: float) -> Line | None:
        """The newest line of a cell."""
        same = (
            one for one in reversed(self.lines) if (one["row"], one["fraction"]) == (row, fraction)
        )
        return next(same, None)

    def measure(self, row: str, fraction: float, work: Callable[[], Line]) -> None:
        """Add the line of a cell, unless it is there."""
        if self.cell(row, fraction) is not None:
            return
        line = {"row": row, "fraction": fraction} | work() | measured_on(torch.device("cpu"))
        print(json.dumps(line), flush=True)
        self.lines.append(line)
        self.path.parent.mkdir(exist_ok=True)
        durable.write_text(self.path, "".join(json.dumps(one) + "\n" for one in self.lines))


def forge_settings(root: Path, fraction: float) -> ForgeSettings:
    """The forge of one fraction; its data are those of every other, and of the table."""
    training = TrainConfig(
        model=str(gguf_path()),
        data=["-"],
        method="lora",
        max_steps=STEPS,
        learning_rate=5e-4,
        max_length=MAX_LENGTH,
        checkpoint_every=20,
        device="cpu",
        seed=0,
        plot=False,
    )
    row = Row(RECOVERED, "least-squares")
    return ForgeSettings(
        output_dir=root / f"forge-{fraction:g}",
        training=training,
        pruning=row.settings(fraction, root / "data" / "train.jsonl"),
        baseline=fraction == FRACTIONS[0],
        heldout_rows=HELDOUT_ROWS,
        samples=0,
        domain=str(root / "data"),
    )


def pruned_figures(
    model: Path,
    root: Path,
    row: Row,
    fraction: float,
    judge: Judge,
    known: dict[str, list[LayerScores]],
) -> Line:
    """Prune, read back, evaluate; the model is deleted again. `known` are scores, by the metric."""
    target = root / f"{row.name}-{fraction:g}"
    shutil.rmtree(target, ignore_errors=True)
    settings = row.settings(fraction, root / "data" / "train.jsonl")
    key = f"{row.metric}-{row.scope}-{row.seed}"
    done = prune(model, target, settings, scored=known.get(key))
    if done.scored is not None:
        known[key] = done.scored
    record = done.record
    result = judge.assess(target)
    shutil.rmtree(target)
    told: Line = {"heads": record["heads"]["removed"], "scope": record["scope"]}
    return figures(result) | told | {"calibration_rows": settings.calibration_rows}


def figures(judged: Line) -> Line:
    """What a line holds of an assessment."""
    return {name: judged[name] for name in ("perplexity", "interval", "tokens")}


def prepared(root: Path) -> Judge:
    """Write the rows, and judge by the first that are held out."""
    data = root / "data"
    if not data.exists():
        write_docstrings(data)
    heldout = data / f"heldout-{HELDOUT_ROWS}.jsonl"
    rows = (data / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    durable.write_text(heldout, "".join(rows[:HELDOUT_ROWS]))
    return Judge(heldout, (), MAX_LENGTH, "cpu", "auto")


def measure(lines: Lines, root: Path, only: list[str], other: Path | None = None) -> None:
    """Every cell that is asked for and missing, of SmolLM2 or another model."""
    judge, model = prepared(root), other or gguf_path()
    known: dict[str, list[LayerScores]] = {}
    lines.measure(WHOLE, 0.0, lambda: figures(judge.assess(model)))
    for row in ROWS if other is None else OTHER_ROWS:
        for fraction in FRACTIONS:
            if not only or row.name in only or row.metric in only:
                lines.measure(
                    row.name,
                    fraction,
                    lambda row=row, fraction=fraction: pruned_figures(  # type: ignore[misc]
                        model, root, row, fraction, judge, known
                    ),
                )
    for fraction in FRACTIONS if other is None else ():
        if not only or "recovered" in only:
            recover(lines, root, fraction)


def recover(lines: Lines, root: Path, fraction: float) -> None:
    """Prune, repair and fine-tune; with the first fraction the baseline too."""
    settings = forge_settings(root, fraction)
    name = f"{RECOVERED}-repaired, then {STEPS} steps of LoRA"

    def trained() -> Line:
        return figures(forge(settings, resume=True)["cycles"][0]["trained"])

    def baseline() -> Line:
        return figures(forge(settings, resume=True)["baseline_cycles"][0]["trained"])

    lines.measure(name, fraction, trained)
    if settings.baseline:
        lines.measure(f"{WHOLE}, then {STEPS} steps of LoRA", 0.0, baseline)


def markdown(lines: Lines) -> str:
    """The table, of the newest line of every cell."""
    whole = lines.cell(WHOLE, 0.0)
    told = "" if whole is None else f" ({whole['tokens']} trained tokens)"
    columns = (0.0, *FRACTIONS)
    text = [
        "# Head pruning of SmolLM2-135M-Instruct",
        "",
        f"Perplexity on {HELDOUT_ROWS} held-out docstring rows{told}",
        "of models read back from the disk, in brackets the middle 95 % of draws of the rows. 27,",
        "54 and 81 of 270 attention heads are pruned, in mode zero. Calibration rows are others;",
        "lines with all settings are in `prune_smollm2.jsonl`. Written by",
        "`python -m bench.prune_smollm2`.",
        "",
        f"| | {' | '.join(f'{100 * fraction:.0f} %' for fraction in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name in dict.fromkeys(one["row"] for one in lines.lines if "perplexity" in one):
        cells = [lines.cell(name, fraction) for fraction in columns]
        text.append(f"| {name} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*text, ""])


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    return f"{line['perplexity']:.2f} ({between(line['interval'])})"


def between(interval: list[float]) -> str:
    """An interval in a cell."""
    return f"{interval[0]:.1f} - {interval[1]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_smollm2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune-smollm2"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table, or recovered")
    parser.add_argument("--model", type=Path, help="another model than SmolLM2")
    parser.add_argument("--name", default="smollm2", help="of the model, for prune_NAME.jsonl")
    given = parser.parse_args()
    lines = Lines(given.results / f"prune_{given.name}.jsonl")
    measure(lines, given.output_dir, given.only, given.model)
    if given.model is not None:
        return
    table = markdown(lines)
    durable.write_text(given.results / "prune_smollm2.md", table)
    print(table)


if __name__ == "__main__":
    main()
