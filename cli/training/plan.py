"""`engine plan`: what a run will need, before it allocates anything.

Takes every setting of `engine train`; rows are read where --data names some, weights never.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.spelling import number_and_size
from engine.config.tasks.workflow import PlanSettings
from engine.config.train_config import NO_DATA, TrainConfig
from engine.runs.startup import importing


def plan(call: Call) -> int:
    """Plan a run: bytes by owner, peaks of loading, a step and saving, and the time of a step.

    --model also takes a name such as llama-3.1-8b, whose shape is known. With --memory-budget the
    fastest settings that fit are chosen, and with --preset auto those for this machine's memory.
    With --data the rows are checked, and where MODEL has a tokenizer their lengths are planned for.
    --gpus 8x80GiB --link nvlink4 compares how a run can use several GPUs: memory of each, bytes
    that are sent, an estimate of the time. Its step is the same on any number of them.
    """
    options = call.read(PlanSettings)
    if options.sizes:
        return _show_sizes(call)
    count, size = number_and_size(options.gpus)
    settings = call.without("gpus").read(TrainConfig)
    if size is not None:
        return _show_cluster(settings, options, call)
    settings = settings.model_copy(update={"gpus": count})
    with importing():
        from engine.verbs.training.plan import find_target
        from engine.verbs.training.plan import plan as plan_run
    if options.max_context:
        any_row = settings.model_copy(update={"data": NO_DATA})
        return _show_contexts(settings, find_target(any_row), call)
    with _progress() as tried:
        report = plan_run(settings, options.gpu, tried)
    if not call.print_json(report.as_dict()):
        say(report.text())
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many plans were made; elsewhere nothing."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda made: None
        return
    with console.status("Planning") as status:
        yield lambda made: status.update(f"Planning: {made} combinations of settings tried")


def _show_cluster(settings: TrainConfig, options: PlanSettings, call: Call) -> int:
    with importing():
        from engine.verbs.plan_cluster import plan_cluster
    report = plan_cluster(settings, options)
    if not call.print_json(report.as_dict()):
        say(report.text())
    return 0


def _show_sizes(call: Call) -> int:
    from engine.memory.model_shapes import NAMES, PARAMETERS, preset_config

    known = {name: model for name in NAMES if (model := preset_config(name)) is not None}
    if call.print_json({"parameters": PARAMETERS}):
        return 0
    say(f"{'model':<24}{'parameters':>17}  kind, layers x width")
    for name, model in known.items():
        shape = f"{model.model_type}, {model.num_hidden_layers} x {model.hidden_size}"
        say(f"{name:<24}{PARAMETERS[name]:>17,}  {shape}")
    say("Of models that also see pictures or predict further tokens, the decoder is counted.")
    return 0


def _show_contexts(settings: TrainConfig, target: Any, call: Call) -> int:
    from engine.memory.search import context_table
    from engine.verbs.training.plan import told

    with _progress() as tried:
        table = context_table(settings, told(target.plan, tried), target.longest_row)
    if call.print_json({"max_context": {str(row.gigabytes): row.tokens for row in table}}):
        return 0
    say(f"{target.title}, one row, {settings.method}, all that saves memory")
    say(f"{'GB':>5}{'tokens':>14}{'with weights streamed':>24}")
    for row in table:
        cells = ["does not fit" if n is None else f"{n:,}" for n in (row.resident, row.streamed)]
        say(f"{row.gigabytes:>5}{cells[0]:>14}{cells[1]:>24}")
    return 0


_VERB = Verb("plan", (PlanSettings, TrainConfig), presets=True, defaults=(("data", list(NO_DATA)),))
app = make_app((_VERB, plan))
