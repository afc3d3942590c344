"""`engine quantize`: write a model in 4, 8 or 16 bits."""

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from engine.config.tasks.quantizing import QuantizeSettings


def quantize_model(call: Call) -> None:
    """Write a model in 4 or 8 bits as bitsandbytes does, or in 16, tensor by tensor."""
    settings = call.read(QuantizeSettings)
    from engine.verbs.models.quantize import quantize_with

    result = quantize_with(settings)
    figures: dict[str, float] = {"bits": result.bits, "quantised": result.quantised}
    figures |= {"copied": result.copied, "bytes_before": result.bytes_before}
    figures |= {"bytes_after": result.bytes_after} | result.perplexity
    if call.print_json({"output": str(result.output)} | figures):
        return
    copied = f", {result.copied} copied as they are" if result.copied else ""
    say(f"{result.quantised} of {result.written.tensors} tensors quantised{copied}")
    say(f"{result.bytes_before / 1e6:,.1f} MB before, {result.bytes_after / 1e6:,.1f} MB now")
    if result.perplexity:
        before, after = result.perplexity.values()
        say(f"perplexity {before:.4f} before, {after:.4f} now")
    say(f"Model saved to: {result.output}")
    if result.pushed:
        say(f"Sent to: {result.pushed}")


app = make_app((Verb("quantize", (QuantizeSettings,)), quantize_model))
