"""`engine prune`: score the attention heads of a model and prune a fraction of them."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Base, Device, Dtype, Json, Model, Quantize

app = typer.Typer(add_completion=False)


class Metric(StrEnum):
    """What makes a head important."""

    l2 = "l2"
    ov = "ov"
    activation = "activation"
    gradient = "gradient"
    random = "random"


class Mode(StrEnum):
    """How a pruned head is taken out."""

    zero = "zero"
    mask = "mask"
    structural = "structural"


class Kind(StrEnum):
    """Which heads are pruned."""

    attention = "attention"
    delta = "delta"


class Scope(StrEnum):
    """Over what the fraction is taken."""

    whole = "global"
    layer = "layer"


class Granularity(StrEnum):
    """What is pruned as one."""

    head = "head"
    kv_group = "kv-group"


Scopes = Annotated[Scope, typer.Option(help="Rank all heads together, or those of each layer.")]
Granularities = Annotated[
    Granularity, typer.Option(help="Single heads, or key/value heads with all that read them.")
]
MinHeads = Annotated[int, typer.Option(min=1, help="Heads to leave in every layer.")]
MinKVHeads = Annotated[int, typer.Option(min=1, help="Key/value heads to leave in every layer.")]
Protect = Annotated[
    str, typer.Option(help="Layers to leave alone, such as 0,1,-1 (-1 is the last).")
]
PerLayer = Annotated[
    bool,
    typer.Option(
        "--per-layer",
        help="With structural: another number from each layer. Only this engine loads it.",
    ),
]
AllowShortfall = Annotated[
    bool, typer.Option("--allow-shortfall", help="Prune fewer where the rules allow no more.")
]


def layer_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of layer numbers, such as 0,1,-1") from error


@app.command(name="prune")
def prune_heads(
    model: Model,
    fraction: Annotated[float, typer.Option(help="Share of the attention heads to prune.")],
    output: Annotated[Path | None, typer.Option(help="New directory for the pruned model.")] = None,
    metric: Annotated[
        Metric,
        typer.Option(
            help="l2: norm of the head's weights; ov: norm of its value-output product; "
            "activation and gradient: measured on --data; random: a control."
        ),
    ] = Metric.l2,
    mode: Annotated[
        Mode,
        typer.Option(
            help="zero: same shapes, zeros; mask: weights kept, a mask beside them; structural: "
            "smaller weights, the same in every layer."
        ),
    ] = Mode.zero,
    per_layer: PerLayer = False,
    heads: Annotated[
        Kind, typer.Option(help="Those of attention, or of DeltaNet layers, by their own rules.")
    ] = Kind.attention,
    scope: Scopes = Scope.whole,
    granularity: Granularities = Granularity.head,
    min_heads: MinHeads = 1,
    min_kv_heads: MinKVHeads = 1,
    protect: Protect = "",
    allow_shortfall: AllowShortfall = False,
    data: Annotated[
        list[Path] | None, typer.Option(help="Calibration rows (JSONL or JSON); may repeat.")
    ] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="Rows of --data to run.")] = 64,
    max_length: Annotated[int, typer.Option(min=8, help="Longest row in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the metric random.")] = 0,
    quantize: Quantize = Base.none,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_shard_size: Annotated[
        float, typer.Option(min=0.001, help="Largest file in GB (10^9 bytes).")
    ] = 5.0,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Score and choose; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prune the least important attention heads of a model.

    Writes a complete model directory with pruning.json and a heat map of head importance.
    """
    from engine.errors import ConfigError
    from engine.prune import PruneSettings, prune
    from engine.pruning.report import table

    if (output is None) != report_only:
        raise ConfigError(
            "Give --output for the pruned model, or --report-only to write nothing: one of them."
        )
    settings = PruneSettings(
        fraction=fraction,
        metric=metric.value,
        mode=mode.value,
        heads=heads.value,
        scope=scope.value,
        granularity=granularity.value,
        min_heads=min_heads,
        min_kv_heads=min_kv_heads,
        protect=layer_numbers(protect),
        per_layer=per_layer,
        allow_shortfall=allow_shortfall,
        seed=seed,
        data=tuple(data or ()),
        calibration_rows=calibration_rows,
        max_length=max_length,
        quantize=quantize.quantization,
        device=device,
        dtype=dtype,
        max_shard_size=int(max_shard_size * 10**9),
    )
    result = prune(model, output, settings)
    if as_json:
        print(json.dumps(result.record | {"output": str(output) if output else None}))
        return
    print(table(result.record))
    if output is not None:
        print(f"Pruned model saved to: {output}")
