"""`engine forge`: prune, fine-tune, judge what was saved, cycle after cycle."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Json, Model
from cli.prune import (
    AllowShortfall,
    Granularities,
    Granularity,
    Metric,
    MinHeads,
    MinKVHeads,
    PerLayer,
    Protect,
    Scope,
    Scopes,
    layer_numbers,
)
from cli.train import _sort_words

app = typer.Typer(add_completion=False)


class Mode(StrEnum):
    """How a pruned head is taken out."""

    zero = "zero"
    structural = "structural"


@app.command(name="forge")
def forge_model(
    model: Model,
    output_dir: Annotated[Path, typer.Option(help="Where everything goes.")],
    fraction: Annotated[
        float, typer.Option(help="Share of the remaining heads to prune in each cycle.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml KEY=VALUE",
            help="How to fine-tune, as for `engine train`: max_steps=100 lora_rank=16 ...",
        ),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Rows to train on; may repeat.")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="Rows held out; may repeat.")] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Instead of --data: docstrings, a file of rows, or a folder with train.jsonl and "
            "heldout.jsonl."
        ),
    ] = None,
    heldout: Annotated[
        float, typer.Option(min=0.001, max=0.9, help="Share of --data held out.")
    ] = 0.1,
    heldout_rows: Annotated[
        int | None, typer.Option(min=1, help="Judge by the first N held-out rows.")
    ] = None,
    cycles: Annotated[int, typer.Option(min=1, help="Times to prune and train.")] = 1,
    control: Annotated[
        bool, typer.Option("--control", help="Train as much without pruning, beside it.")
    ] = False,
    distill: Annotated[
        bool,
        typer.Option("--distill", help="Learn the unpruned model's probabilities, not the tokens."),
    ] = False,
    metric: Annotated[
        Metric, typer.Option(help="What makes a head important; see `engine prune`.")
    ] = Metric.activation,
    mode: Annotated[
        Mode, typer.Option(help="zero: same shapes; structural: smaller weights.")
    ] = Mode.zero,
    scope: Scopes = Scope.whole,
    granularity: Granularities = Granularity.head,
    min_heads: MinHeads = 1,
    min_kv_heads: MinKVHeads = 1,
    protect: Protect = "",
    per_layer: PerLayer = False,
    allow_shortfall: AllowShortfall = False,
    calibration_rows: Annotated[
        int, typer.Option(min=1, help="Training rows that activation and gradient are measured on.")
    ] = 64,
    samples: Annotated[int, typer.Option(min=0, help="Held-out questions to answer.")] = 3,
    keep_pruned: Annotated[
        bool, typer.Option("--keep-pruned", help="Keep the pruned models that were trained on.")
    ] = False,
    preset: Annotated[str | None, typer.Option(help="Starting point, as for train.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job.")] = False,
    as_json: Json = False,
) -> None:
    """Prune heads, fine-tune what is left, merge, and judge the saved model; cycle after cycle.

    Held-out perplexity is that of models read back from the disk. A cycle that makes the model
    worse by more than 10 % and 1.0 is the last. A job that was stopped goes on with --resume.
    """
    from engine.config.sources import load_config
    from engine.errors import ConfigError
    from engine.forge import ForgeSettings, forge
    from engine.forging.report import PLOT, draw, table
    from engine.forging.report import samples as sample_text
    from engine.prune import PruneSettings

    if (domain is None) == (not data):
        raise ConfigError("Give rows with --data, or a data set with --domain: one of them.")
    file, overrides = _sort_words(words or [], None)
    flags: dict[str, Any] = {"model": model, "data": data or ["-"]}
    if eval_data:
        flags["eval_data"] = eval_data
    training = load_config(file, preset=preset, flags=flags, overrides=overrides)
    pruning = PruneSettings(
        fraction=fraction,
        metric=metric.value,
        mode=mode.value,
        scope=scope.value,
        granularity=granularity.value,
        min_heads=min_heads,
        min_kv_heads=min_kv_heads,
        protect=layer_numbers(protect),
        per_layer=per_layer,
        allow_shortfall=allow_shortfall,
        seed=training.seed,
        calibration_rows=calibration_rows,
        max_length=training.max_length,
        device=training.device,
        dtype=training.dtype,
    )
    settings = ForgeSettings(
        output_dir,
        training,
        pruning,
        cycles=cycles,
        control=control,
        heldout=heldout,
        heldout_rows=heldout_rows,
        samples=samples,
        domain=domain,
        distill=distill,
        keep_pruned=keep_pruned,
    )
    results = forge(settings, resume=resume)
    draw(results, output_dir / PLOT)
    if as_json:
        print(json.dumps(results))
        return
    if samples:
        print(sample_text(results), end="\n\n")
    print(table(results))
    if results["stopped"]:
        print(results["stopped"])
    print(f"Model: {results['model']}")
