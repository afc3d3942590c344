"""`engine eval`: perplexity, gates, or scores in tasks."""

import dataclasses
import math

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.inference import EvalSettings

GATE_FAILED = 3
"""The exit status of a failed gate where gates are strict."""


def evaluate_model(call: Call) -> int | None:
    """Perplexity of a model on held-out rows, with or without an adapter; its gates.

    Counts the tokens a model would be trained on (the assistant's turns), each once. With --gates
    the model also answers rows, and its answers are held against limits. With --objective rows are
    preferences, and what is told is how often the better answer wins. With --tasks the model is
    scored by the LM Evaluation Harness instead.
    """
    settings = call.read(EvalSettings)
    if settings.tasks:
        _score(call, settings)
        return None
    if settings.gates is not None:
        return _judge(call, settings)
    if settings.objective != "sft":
        _prefer(call, settings)
        return None
    from engine.verbs.models.evaluate import evaluate_with

    result = evaluate_with(settings)
    figures = dataclasses.asdict(result)
    if not math.isfinite(result.perplexity):
        figures["perplexity"] = None  # JSON has no word for infinity
    if not call.print_json(figures):
        say(f"perplexity {result.perplexity:.4f}   loss {result.loss:.4f} nats per token")
        for name, loss in result.parts.items():
            say(f"  {name}: loss {loss:.4f}")
        say(f"{result.tokens:,} tokens in {result.rows:,} rows, {result.seconds:.1f} s")
    return None


def _score(call: Call, settings: EvalSettings) -> None:
    """Print the scores in tasks."""
    from engine.verbs.models.score import evaluate_tasks

    done = evaluate_tasks(settings)
    if not call.print_json({"results": done.results}):
        say(done.table)


def _prefer(call: Call, settings: EvalSettings) -> None:
    """Print how well the model tells better answers from worse."""
    from engine.verbs.models.evaluate_answers import evaluate_preferences

    result = evaluate_preferences(settings)
    if not call.print_json({**result.figures, "rows": result.rows, "seconds": result.seconds}):
        say(result.text())


def _judge(call: Call, settings: EvalSettings) -> int | None:
    """Print the gates and their verdict; status 3 where one failed and gates are strict."""
    from engine.verbs.models.judge import is_strict, judge_model, read_gates

    verdict = judge_model(settings, read_gates(settings.gates))
    facts = {
        "passed": verdict.passed,
        "gates": [gate.facts() for gate in verdict.gates],
        "figures": verdict.figures,
        "base": verdict.base,
        "output_dir": str(verdict.output_dir),
    }
    if not call.print_json(facts):
        say(verdict.text())
    return GATE_FAILED if not verdict.passed and is_strict(settings) else None


app = make_app((Verb("eval", (EvalSettings,)), evaluate_model))
