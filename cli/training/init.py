"""`engine init`: a commented configuration for a model, rows and a machine."""

import os
import sys
from pathlib import Path

import typer

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.explain import Setting
from engine.config.tasks.workflow import InitSettings
from engine.errors import ConfigError

_QUESTIONS = {
    "model": "Model (a Hugging Face directory, a hub id or a .gguf file)",
    "data": "Rows to train on (a .jsonl or .json file)",
}


def init(call: Call) -> None:
    """Write a commented configuration for a model, rows and a GPU; nothing is trained.

    Asks for what is not given, where a terminal is there.
    """
    _ask(call)
    settings = call.read(InitSettings)
    from engine.storage import durable
    from engine.verbs.training.init import propose

    if os.path.lexists(settings.output):
        raise ConfigError(
            f"{settings.output} exists already. Nothing was written; name another file with "
            "--output, or move the old one away."
        )
    proposal = propose(settings)
    with durable.publish_files(settings.output) as folder:
        durable.write_text(folder / settings.output.name, proposal.text(settings.output))
    answer = {"file": str(settings.output), "steps": proposal.steps}
    if call.print_json(answer | {"plan": proposal.report.as_dict()}):
        return
    say(proposal.text(settings.output))
    say(f"Settings saved to: {settings.output}\n\nNext:")
    for words in ("plan", "train --dry-run", "train"):
        verb, *flags = words.split()
        say("  " + " ".join(["engine", verb, "--config", str(settings.output), *flags]))


def _ask(call: Call) -> None:
    """Put the answers of a person at the terminal among what was given."""
    missing = [name for name in _QUESTIONS if name not in call.given]
    if not missing or call.as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    for name in missing:
        call.given[name] = Setting(typer.prompt(_QUESTIONS[name]), "your answer")
    if "memory" not in call.given:
        text = typer.prompt(
            "Memory of the GPU to train on (12GiB; empty: this machine)", default=""
        )
        if text:
            call.given["memory"] = Setting(text, "your answer")
    if "output" not in call.given and Path("train.yaml").exists():
        call.given["output"] = Setting(typer.prompt("File for the settings"), "your answer")


app = make_app((Verb("init", (InitSettings,)), init))
