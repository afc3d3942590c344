"""`engine merge`: write a model with adapters merged into it."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.quantizing import MergeSettings


def merge_adapter(call: Call) -> None:
    """Merge adapters into their base model, tensor by tensor, as a Hugging Face directory."""
    settings = call.read(MergeSettings)
    from engine.verbs.models.merge import merge_with

    result = merge_with(settings)
    figures: dict[str, float] = {"merged": result.merged, "tensors": result.written.tensors}
    apart = result.logit_difference
    figures |= result.check | ({} if apart is None else {"logit_difference": apart})
    if not call.print_json({"output": str(result.output), "pushed": result.pushed} | figures):
        say(f"Merged {result.merged} of {result.written.tensors} tensors into: {result.output}")
        if apart is not None:
            say(f"verified: logits as of model and adapter, to {apart:.1g} of their spread")
        if result.check:
            before, after = result.check.values()
            say(f"perplexity {after:.4f}, of the adapter as it was trained {before:.4f}")
        if result.pushed:
            say(f"Sent to: {result.pushed}")


app = make_app((Verb("merge", (MergeSettings,)), merge_adapter))
