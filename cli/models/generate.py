"""`engine generate`: one answer to one prompt."""

import dataclasses
import sys

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.inference import GenerateSettings


def generate(call: Call) -> None:
    """Answer a prompt in the model's own chat format."""
    settings = call.read(GenerateSettings)
    if settings.prompt == "-":
        settings = settings.model_copy(update={"prompt": sys.stdin.read()})
    from engine.verbs.generate import answer

    result = answer(settings)
    if not call.print_json(dataclasses.asdict(result)):
        print(result.text)


app = make_app((Verb("generate", (GenerateSettings,)), generate))
