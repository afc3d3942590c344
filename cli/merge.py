"""`engine merge`: write a model with an adapter merged into it."""

import typer

from cli.from_settings import Call, Verb, add_verb
from engine.config.task_settings import MergeSettings

app = typer.Typer(add_completion=False)


def merge_adapter(call: Call) -> None:
    """Merge an adapter into its base model, tensor by tensor, as a Hugging Face directory."""
    settings = call.read(MergeSettings)
    from engine.merge import merge

    result = merge(**dict(settings))
    figures = {"merged": result.merged, "tensors": result.written.tensors}
    if not call.print_json({"output": str(result.output)} | figures):
        print(f"Merged {result.merged} of {result.written.tensors} tensors into: {result.output}")


add_verb(app, Verb("merge", (MergeSettings,)), merge_adapter)
