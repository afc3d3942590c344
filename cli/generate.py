"""`engine generate`: one answer to one prompt."""

import dataclasses
import sys

import typer

from cli.from_settings import Call, Verb, add_verb
from engine.config.task_settings import GenerateSettings

app = typer.Typer(add_completion=False)


def generate(call: Call) -> None:
    """Answer a prompt in the model's own chat format."""
    settings = call.read(GenerateSettings)
    if settings.prompt == "-":
        settings = settings.model_copy(update={"prompt": sys.stdin.read()})
    from engine.generate import answer

    result = answer(settings)
    if not call.print_json(dataclasses.asdict(result)):
        print(result.text)


add_verb(app, Verb("generate", (GenerateSettings,)), generate)
