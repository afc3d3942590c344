"""Channels and layers of SmolLM2: what repair wins, which layer goes.

Channels: 20 % of every layer are pruned by `l2-reconstruction`, repaired and not; each model
is written, read back and evaluated as in `bench.prune_smollm2`. Layers: the one that `engine prune`
chooses on calibration rows, against the held-out loss without each of the 30 (`BRUTE_ROWS` rows).
Lines go to bench/results/prune_smollm2.jsonl, where those of heads are.

Run as ``python -m bench.prune_structures [--output-dir runs/prune-smollm2]``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from bench.prune_smollm2 import MAX_LENGTH, RESULTS, Line, Lines, figures, prepared
from engine.config.choices import RepairMethod
from engine.config.tasks.pruning import PruneSettings
from engine.data.batches.loader import collate
from engine.forging.assess import Judge
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration, calibration_examples
from engine.verbs.models.prune import prune
from examples.smollm2 import gguf_path
from kernels.loss.linear_cross_entropy import linear_cross_entropy

FRACTION, BRUTE_ROWS = 0.2, 24


def channels(root: Path, repair: RepairMethod, judge: Judge) -> Line:
    """Prune channels, read back, evaluate."""
    target = root / f"mlp-{repair}"
    shutil.rmtree(target, ignore_errors=True)
    settings = PruneSettings(
        fraction=FRACTION,
        what="mlp",
        repair=repair,
        data=(str(root / "data" / "train.jsonl"),),
        device="cpu",
        max_length=MAX_LENGTH,
    )
    record = prune(str(gguf_path()), target, settings).record
    result = judge.assess(target)
    shutil.rmtree(target)
    return figures(result) | {"parameters": record["parameters"], "units": record["units"]}


def layers(root: Path) -> Line:
    """The layer that is chosen, and the held-out loss without each layer."""
    settings = PruneSettings(
        fraction=1 / 30,
        what="layers",
        data=(str(root / "data" / "train.jsonl"),),
        device="cpu",
        max_length=MAX_LENGTH,
    )
    (chosen,) = prune(str(gguf_path()), None, settings).record["pruned_layers"]
    losses = losses_without_each(root / "data" / "heldout.jsonl")
    order = sorted(range(len(losses)), key=losses.__getitem__)
    return {
        "chosen": chosen,
        "best": order[0],
        "rank": order.index(chosen) + 1,
        "losses": [round(loss, 5) for loss in losses],
        "rows": BRUTE_ROWS,
    }


@torch.no_grad()
def losses_without_each(heldout: Path) -> list[float]:
    """Nats a token of the model without each of its layers, those below run once."""
    source = open_model_source(str(gguf_path()))
    how = Calibration((str(heldout),), rows=BRUTE_ROWS, max_length=MAX_LENGTH)
    model = build_model(source, device=torch.device("cpu"), dtype=torch.float32)
    batch = collate(calibration_examples(source, how))
    states, losses = model.model.embed_tokens(batch.input_ids), []
    count = len(model.layers)
    for layer in range(count):
        left = model.continued(states, batch, range(layer + 1, count))
        trained = model.model.norm(left.index_select(0, batch.trained))
        total = linear_cross_entropy(trained, model.head_weight(), batch.targets, 1.0)
        losses.append(float(total) / batch.trained_tokens)
        states = model.continued(states, batch, [layer])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prune_structures")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/prune-smollm2"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    lines, judge = Lines(given.results / "prune_smollm2.jsonl"), prepared(given.output_dir)
    lines.measure("layer of 30", 0.0, lambda: layers(given.output_dir))
    for repair in ("least-squares", "none"):
        name = "mlp" + ("-repaired" if repair == "least-squares" else "")
        lines.measure(
            name,
            FRACTION,
            lambda repair=repair: channels(given.output_dir, repair, judge),  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
