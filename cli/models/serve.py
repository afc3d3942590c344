"""`engine serve`: an HTTP server that speaks OpenAI's interface."""

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.serving import ServeSettings


def serve(call: Call) -> int:
    """Answer requests over HTTP, as OpenAI's interface has them, until told to stop."""
    settings = call.read(ServeSettings)
    from engine.verbs.models.serve import run

    run(settings)
    return 0


app = make_app((Verb("serve", (ServeSettings,), json=False), serve))
