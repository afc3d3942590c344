"""`engine generate`: answers to a prompt or to a file."""

import dataclasses
import sys

from cli.from_settings import Call, Verb, make_app
from cli.say import say, say_answer
from engine.config.tasks.inference import GenerateSettings
from engine.errors import ConfigError

_LONGEST_PROMPT = 1 << 26


def _standard_input() -> str:
    """The prompt that is given on standard input. Raises `ConfigError` for one without end."""
    text = sys.stdin.read(_LONGEST_PROMPT + 1)
    if len(text) > _LONGEST_PROMPT:
        raise ConfigError(
            f"Standard input holds more than {_LONGEST_PROMPT >> 20} million characters, where a "
            "prompt was expected. Look at what is given to the command."
        )
    return text


def generate(call: Call) -> int:
    """Answer a prompt in the model's own chat format, word by word, or every row of a file."""
    settings = call.read(GenerateSettings)
    if settings.data is not None or settings.output is not None:
        return _rows(call, settings)
    if settings.prompt == "-":
        settings = settings.model_copy(update={"prompt": _standard_input()})
    if settings.num_samples > 1 and settings.prompt is not None:
        return _samples(call, settings, settings.prompt)
    from engine.verbs.models.generate import answer

    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        if not call.as_json:
            say_answer(piece, end="", flush=True)

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
            more = f"; --max-new-tokens {4 * settings.max_new_tokens} allows more"
            if result.completion_tokens < settings.max_new_tokens:
                more = ", where the model's context ends"
            print(
                f"The answer was cut after {result.completion_tokens} tokens{more}.",
                file=sys.stderr,
            )
    return 0


def _samples(call: Call, settings: GenerateSettings, prompt: str) -> int:
    from engine.verbs.models.generate import answer_prompts

    results = answer_prompts(settings, [prompt])
    if not call.print_json({"samples": [dataclasses.asdict(result) for result in results]}):
        for number, result in enumerate(results, 1):
            say_answer(f"[{number}] {result.text}")
        if results[0].sampling is not None:
            print(results[0].sampling, file=sys.stderr)
    return 0


def _rows(call: Call, settings: GenerateSettings) -> int:
    from engine.verbs.models.generate import answer_rows

    def show(done: int, rows: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {rows} rows", end="", file=sys.stderr, flush=True)

    answered = answer_rows(settings, show)
    if not call.print_json({"rows": answered, "output": str(settings.output)}):
        say(f"{answered} rows answered into {settings.output}")
    return 0


app = make_app((Verb("generate", (GenerateSettings,)), generate))
