"""engine sweep: runs with several values of their settings, one after another."""

from typing import TYPE_CHECKING

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.comparing import SweepSettings

if TYPE_CHECKING:
    from engine.sweeps.trials import Trial

OPENS_LOG = True


def run_sweep(call: Call) -> int:
    """Train with every combination of listed values, or with values drawn at random.

    FILE names settings of engine train and what is varied of them. A sweep that was stopped goes on
    where it was; at the end a table and a picture show its trials.
    """
    settings = call.read(SweepSettings)
    from engine.sweeps.report import PICTURE, TABLE, sweep_table
    from engine.verbs.training.sweep import sweep_with

    def told(trial: "Trial", what: str) -> None:
        if not call.as_json:
            values = ", ".join(f"{k}={v}" for k, v in trial.values.items())
            say(f"== {trial.name} ({values}): {what}", flush=True)

    result = sweep_with(settings, told)
    if call.print_json(result.as_dict()):
        return result.status
    say(sweep_table(result))
    if settings.dry_run:
        return 0
    folder, best = result.sweep.output_dir, result.best
    if best is not None:
        reached = f"{best.trial.name}, {result.sweep.metric} {best.value:.6g}"
        say(f"\nBest: {reached}: {best.trial.folder}")
    say(f"Table: {folder / TABLE}")
    if (folder / PICTURE).exists():
        say(f"Picture: {folder / PICTURE}")
    return result.status


app = make_app((Verb("sweep", (SweepSettings,), words="file"), run_sweep))
