"""`engine eval`: token-weighted perplexity over the trained tokens of a data set."""

import dataclasses
import math

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.inference import EvalSettings


def evaluate_model(call: Call) -> None:
    """Perplexity of a model on held-out rows, with or without an adapter.

    Counts the tokens a model would be trained on (the assistant's turns), each once.
    """
    settings = call.read(EvalSettings)
    from engine.verbs.models.evaluate import evaluate_with

    result = evaluate_with(settings)
    figures = dataclasses.asdict(result)
    if not math.isfinite(result.perplexity):
        figures["perplexity"] = None  # JSON has no word for infinity
    if not call.print_json(figures):
        print(f"perplexity {result.perplexity:.4f}   loss {result.loss:.4f} nats per token")
        print(f"{result.tokens:,} tokens in {result.rows:,} rows, {result.seconds:.1f} s")


app = make_app((Verb("eval", (EvalSettings,)), evaluate_model))
