"""`engine merge`: a model with an adapter merged into its weights, as a new directory."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json, Model

app = typer.Typer(add_completion=False)


class Onto(StrEnum):
    """The weights that the adapter is added to."""

    original = "original"
    dequantised = "dequantised"


@app.command(name="merge")
def merge_adapter(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Adapter to merge.")],
    output: Annotated[Path, typer.Option(help="New directory for the merged model.")],
    onto: Annotated[
        Onto,
        typer.Option(help="The weights as they are, or as 4-bit training saw them."),
    ] = Onto.original,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default each tensor keeps its own."),
    ] = None,
    max_shard_size: Annotated[
        float, typer.Option(min=0.001, help="Largest file in GB (10^9 bytes).")
    ] = 5.0,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model, tensor by tensor, as a Hugging Face directory."""
    from engine.merge import merge

    result = merge(
        model,
        adapter,
        output,
        max_shard_size=int(max_shard_size * 10**9),
        onto="original" if onto is Onto.original else "dequantised",
        dtype=dtype,
    )
    if as_json:
        figures = {"merged": result.merged, "tensors": result.written.tensors}
        print(json.dumps({"output": str(result.output)} | figures))
        return
    print(f"Merged {result.merged} of {result.written.tensors} tensors into: {result.output}")
