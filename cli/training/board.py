"""`engine board`: runs in a browser, while they train and afterwards."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.workflow import BoardSettings

# What a preview of rows logs would be repeated in this terminal for every row that is looked at.
OPENS_LOG = True


def board(call: Call) -> None:
    """Show runs in a browser: curves, settings, samples, rows, and pruned heads.

    The page is served on 127.0.0.1 until Ctrl-C. It only reads.
    """
    settings = call.read(BoardSettings)
    from engine.verbs.training.board import board

    named = ", ".join(settings.runs)
    board(
        settings.runs,
        settings.port,
        lambda address: say(f"Runs in {named}: {address}  (Ctrl-C ends it)", flush=True),
    )


app = make_app((Verb("board", (BoardSettings,), words="runs", json=False), board))
