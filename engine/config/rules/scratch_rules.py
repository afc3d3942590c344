"""Rules between the settings of models that are trained whole."""

from engine.config.rules.rule import Rule

SCRATCH_RULES = (
    Rule(
        "tokenizer",
        lambda c, _: c.tokenizer is not None and c.method != "scratch",
        "tokenizer {c.tokenizer} was given with method {c.method}, whose model knows the tokens of "
        "its own tokenizer: with another its ids would mean something else.",
        "Leave it out, or train a model from random weights with --method scratch",
    ),
    Rule(
        "model",
        lambda c, _: c.model.startswith("builtin:") and c.method != "scratch",
        "{c.model} is a shape without weights, and method is {c.method}.",
        "Give --method scratch (or --preset scratch), or a pretrained model",
    ),
    Rule(
        "lora_dropout",
        lambda c, _: c.lora_dropout > 0 and c.method == "scratch",
        "lora_dropout (also called dropout) is an adapter's, and method is scratch.",
        "Give --hidden-dropout and --attention-dropout instead",
    ),
    Rule(
        "hidden_dropout",
        lambda c, _: (c.hidden_dropout > 0 or c.attention_dropout > 0) and not c.every_weight,
        "hidden_dropout and attention_dropout are for weights that are trained, and method is "
        "{c.method}.",
        "Give --lora-dropout, the adapter's, or method full or scratch",
    ),
)
