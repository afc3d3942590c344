"""`engine generate`: one answer to one prompt."""

import dataclasses
import sys

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.inference import GenerateSettings


def generate(call: Call) -> int:
    """Answer a prompt in the model's own chat format, word by word as it is written."""
    settings = call.read(GenerateSettings)
    if settings.prompt == "-":
        settings = settings.model_copy(update={"prompt": sys.stdin.read()})
    from engine.verbs.models.generate import answer

    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not call.as_json:
            print(piece, end="", flush=True)

    try:
        result = answer(settings, show)
    except KeyboardInterrupt:
        # What there is stays: it was shown already, or is in the object.
        if pieces and not call.print_json({"text": "".join(pieces), "finish_reason": "stopped"}):
            print()
        raise
    if not call.print_json(dataclasses.asdict(result)):
        print()
        if result.sampling is not None:
            print(result.sampling, file=sys.stderr)
        if result.finish_reason == "length":
            print(
                f"The answer was cut after {result.completion_tokens} tokens; "
                f"--max-new-tokens {4 * settings.max_new_tokens} allows more.",
                file=sys.stderr,
            )
    return 0


app = make_app((Verb("generate", (GenerateSettings,)), generate))
