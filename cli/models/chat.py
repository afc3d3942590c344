"""`engine chat`: a conversation with a model in the terminal."""

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.serving import ChatSettings


def chat(call: Call) -> int:
    """Talk with a model: it answers word by word and remembers; /help lists the commands."""
    settings = call.read(ChatSettings)
    from engine.verbs.models.chat import chat as talk

    talk(settings)
    return 0


app = make_app((Verb("chat", (ChatSettings,), json=False), chat))
