"""engine export: models and adapters for other programs."""

import dataclasses

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.inference import ExportAdapterSettings, ExportGGUFSettings


def gguf(call: Call) -> None:
    """Write a model as a GGUF file for llama.cpp and Ollama; with --adapter the adapter alone."""
    settings = call.read(ExportGGUFSettings)
    from engine.verbs.models.export import export_gguf

    result = export_gguf(settings)
    answer = dataclasses.asdict(result) | {"files": [str(file) for file in result.files]}
    if call.print_json(answer):
        return
    formats = ", ".join(f"{count} {form}" for form, count in result.formats.items())
    say(f"{result.tensors} tensors ({formats}), {result.total_bytes / 1e6:,.1f} MB")
    say(f"GGUF saved to: {', '.join(str(file) for file in result.files)}")
    if result.pushed:
        say(f"Sent to: {result.pushed}")


def adapter(call: Call) -> None:
    """Write an adapter so that PEFT, vLLM and llama.cpp compute the same, or say who would not."""
    settings = call.read(ExportAdapterSettings)
    from engine.verbs.models.export import export_adapter

    result = export_adapter(settings)
    if call.print_json({"output": str(settings.output), **dataclasses.asdict(result)}):
        return
    say("\n".join(result.notes))
    say(f"Adapter saved to: {settings.output}")
    if result.pushed:
        say(f"Sent to: {result.pushed}")


app = make_app(
    (Verb("export gguf", (ExportGGUFSettings,)), gguf),
    (Verb("export adapter", (ExportAdapterSettings,)), adapter),
)
