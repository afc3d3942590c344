"""`engine import-config`: another program's configuration as a file for `engine train`."""

import sys

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.workflow import ImportSettings


def import_config(call: Call) -> None:
    """Translate a configuration of axolotl, LLaMA-Factory, TRL or mlx-lm into settings of ours.

    What has no counterpart here is listed, with the reason.
    """
    settings = call.read(ImportSettings)
    from engine.config.programs import as_yaml as verb
    from engine.storage import durable

    result = verb.import_config(settings.file, settings.program)
    text, refusal = verb.as_yaml(result, settings.file), verb.refusal(result)
    if settings.output is not None:
        durable.refuse_occupied(settings.output)
        with durable.publish_files(settings.output) as folder:
            durable.write_text(folder / settings.output.name, text)
    answer = {"program": result.program, "settings": result.values(), "missing": result.missing}
    if call.print_json(answer | {"needless": result.needless, "refusal": refusal}):
        return
    if settings.output is None:
        say(text, end="")
    else:
        say("\n".join(verb.notes(result)).strip())
        say(f"\nSettings of {result.program} saved to: {settings.output}")
        say(f"Next: engine train --config {settings.output} --dry-run")
    if refusal is not None:
        print(f"engine train will ask for more: {refusal}", file=sys.stderr)


app = make_app((Verb("import-config", (ImportSettings,), words="file"), import_config))
