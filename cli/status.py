"""`engine status`: how far a run is, from its files alone."""

from pathlib import Path

import typer

from cli.from_settings import Call, Verb, add_verb
from engine.config.task_settings import StatusSettings

app = typer.Typer(add_completion=False)


def status(call: Call) -> None:
    """How far a run is: progress, loss, speed, time left, and whether it is alive."""
    settings = call.read(StatusSettings)
    from engine.status import describe_status, find_run, read_status

    state = read_status(find_run(settings.run, Path("runs")), settings.tail)
    if not call.print_json(state):
        print("\n".join(describe_status(state)))


add_verb(app, Verb("status", (StatusSettings,), words="run"), status)
