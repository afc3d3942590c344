"""`engine merge`: write a model with an adapter merged into it."""

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.inference import MergeSettings


def merge_adapter(call: Call) -> None:
    """Merge an adapter into its base model, tensor by tensor, as a Hugging Face directory."""
    settings = call.read(MergeSettings)
    from engine.verbs.models.merge import merge

    result = merge(**dict(settings))
    figures: dict[str, float] = {"merged": result.merged, "tensors": result.written.tensors}
    figures |= result.check
    if not call.print_json({"output": str(result.output)} | figures):
        print(f"Merged {result.merged} of {result.written.tensors} tensors into: {result.output}")
        if result.check:
            before, after = result.check.values()
            print(f"perplexity {after:.4f}, of the adapter as it was trained {before:.4f}")


app = make_app((Verb("merge", (MergeSettings,)), merge_adapter))
