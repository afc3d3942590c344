"""`engine prune`: remove the least important attention heads."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.pruning import PruneJob


def prune_heads(call: Call) -> None:
    """Prune the least important attention heads of a model.

    Writes a complete model directory with pruning.json and a heat map of head importance.
    """
    job = call.read(PruneJob)
    from engine.pruning.report import table
    from engine.verbs.models.prune import prune

    result = prune(job.model, job.output, job)
    if call.print_json(result.record | {"output": str(job.output) if job.output else None}):
        return
    say(table(result.record))
    if job.output is not None:
        say(f"Pruned model saved to: {job.output}")


app = make_app((Verb("prune", (PruneJob,)), prune_heads))
