"""Remove attention heads, and win back what it cost.

    python -m examples.prune_and_recover --model MODEL --data rows.jsonl --heldout heldout.jsonl

Prunes the heads that matter least on the rows, trains LoRA on what is left (no pruned head comes
back), merges, and prints the held-out perplexity before, after pruning and after training.
`engine data docstrings --output-dir data` makes both files to try with; `engine forge` does the
same in cycles, resumable, with a baseline beside it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import engine
from engine.config.tasks.pruning import PruneSettings
from engine.verbs.models.evaluate import evaluate
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.prune_and_recover", description="Prune heads.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/prune_and_recover"))
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(arguments)

    def perplexity(model: str | Path) -> float:
        return evaluate(model, [given.heldout], max_length=256).perplexity

    pruned, run, recovered = (given.output / name for name in ("pruned", "run", "recovered"))
    before = perplexity(given.model)

    # With rows, heads are chosen by the error that is left once the others make up for them, and
    # the others are repaired so. Weights alone can do worse than chance.
    settings = PruneSettings(fraction=given.fraction, data=[given.data])
    record = prune(given.model, pruned, settings).record
    print(f"pruned {record['heads']['removed']} of {record['heads']['before']} heads")
    after = perplexity(pruned)

    config = engine.TrainConfig(
        model=str(pruned),
        data=given.data,
        output_dir=run,
        method="lora",
        learning_rate=5e-4,
        max_length=256,
        max_steps=given.steps,
    )
    adapter = engine.train(config).adapter_path
    assert adapter is not None
    merge(pruned, adapter, recovered)
    print(
        f"perplexity {before:.2f} before, {after:.2f} pruned, {perplexity(recovered):.2f} trained"
    )
    print(f"model in {recovered}")


if __name__ == "__main__":
    main()
