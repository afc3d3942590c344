"""`engine status`: how far a run is, from its files alone."""

from pathlib import Path

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.workflow import StatusSettings


def status(call: Call) -> None:
    """How far a run is: progress, loss, speed, time left, and whether it is alive."""
    settings = call.read(StatusSettings)
    from engine.verbs.training.status import describe_status, find_run, read_status

    state = read_status(find_run(settings.run, Path("runs")), settings.tail)
    if not call.print_json(state):
        say("\n".join(describe_status(state)))


app = make_app((Verb("status", (StatusSettings,), words="run"), status))
