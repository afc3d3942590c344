"""Settings of models that are trained whole: their tokenizer and their dropout."""

from engine.config.choices import EVERY_WEIGHT, Method
from engine.config.settings import Settings, setting


class WholeModelSettings(Settings):
    """What methods full and scratch have besides those of adapters."""

    tokenizer: str | None = setting(
        None,
        "Model",
        "method scratch: folder or hub id of the tokenizer, or char for the built-in one of 133 "
        "characters; by default the model's own",
        min_length=1,
    )
    hidden_dropout: float = setting(
        0.0,
        "Optimisation",
        "methods full and scratch: dropout of the embedding and of what each part of a layer adds",
        ge=0,
        lt=1,
    )
    attention_dropout: float = setting(
        0.0,
        "Optimisation",
        "methods full and scratch: dropout of attention's weights; slower than without",
        ge=0,
        lt=1,
    )

    @property
    def every_weight(self) -> bool:
        """Whether all weights are trained, and no adapter."""
        method: Method = getattr(self, "method")  # noqa: B009 (a setting of another table)
        return method in EVERY_WEIGHT
