"""engine compare: runs side by side."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.comparing import CompareSettings


def compare(call: Call) -> None:
    """Settings that differ, curves and final figures of several runs, from their files alone.

    RUNS are run directories, or names under runs/. They may still be training.
    """
    settings = call.read(CompareSettings)
    from engine.comparing.text import comparison_text
    from engine.verbs.training.compare import compare as compare_runs

    comparison = compare_runs(settings.runs, plot=settings.plot)
    if call.print_json(comparison.as_dict()):
        return
    say(comparison_text(comparison))
    if settings.plot is not None:
        say(f"\nCurves: {settings.plot}")


app = make_app((Verb("compare", (CompareSettings,), words="runs"), compare))
