"""`engine eval`: token-weighted perplexity over the trained tokens of a data set."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer

from cli.options import (
    Adapter,
    Base,
    Device,
    Dtype,
    Json,
    Model,
    Quantize,
    TemplateKwargs,
    template_kwargs,
)

app = typer.Typer(add_completion=False)


@app.command(name="eval")
def evaluate_model(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="JSONL or JSON file of rows; may repeat.")],
    adapter: Adapter = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows at a time; bounds memory, not the result.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Longest row in tokens.")] = 2048,
    min_rating: Annotated[
        int | None, typer.Option(min=1, max=5, help="Leave out rows rated lower.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="Only rows of this category.")] = None,
    limit_rows: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    chat_template_kwargs: TemplateKwargs = None,
    quantize: Quantize = Base.none,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of a model on held-out rows, with or without an adapter.

    Counts the tokens a model would be trained on (the assistant's turns), each once.
    """
    from engine.evaluate import evaluate

    result = evaluate(
        model,
        [str(path) for path in data],
        adapter,
        batch_size=batch_size,
        max_length=max_length,
        quantize=quantize.quantization,
        device=device,
        dtype=dtype,
        min_rating=min_rating,
        category=category,
        limit_rows=limit_rows,
        template_kwargs=template_kwargs(chat_template_kwargs),
    )
    if as_json:
        figures = dataclasses.asdict(result)
        if not math.isfinite(result.perplexity):
            figures["perplexity"] = None  # JSON has no word for infinity
        print(json.dumps(figures))
        return
    print(f"perplexity {result.perplexity:.4f}   loss {result.loss:.4f} nats per token")
    print(f"{result.tokens:,} tokens in {result.rows:,} rows, {result.seconds:.1f} s")
