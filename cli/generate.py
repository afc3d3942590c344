"""`engine generate`: one answer to one prompt."""

import dataclasses
import json
import sys
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


@app.command(name="generate")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to answer; - reads standard input.")],
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k likeliest; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0, help="1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may repeat.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the prompt, no template.")] = False,
    chat_template_kwargs: TemplateKwargs = None,
    quantize: Quantize = Base.none,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt in the model's own chat format."""
    from engine.generate import generate_text

    result = generate_text(
        model,
        sys.stdin.read() if prompt == "-" else prompt,
        adapter,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        raw=raw,
        quantize=quantize.quantization,
        device=device,
        dtype=dtype,
        stop=stop or [],
        template_kwargs=template_kwargs(chat_template_kwargs),
    )
    print(json.dumps(dataclasses.asdict(result)) if as_json else result.text)
