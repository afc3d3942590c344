"""Cut chosen heads out of a model."""

from __future__ import annotations

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.pruning_record import HeadMap
from engine.pruning.apply import (
    CutSource,
    counts_per_layer,
    refuse_indivisible,
    remaining,
    renumbered,
)
from engine.pruning.scores import LayerScores
from engine.pruning.selection import Selection


def cut_source(
    source: ModelSource, scored: list[LayerScores], choice: Selection, per_layer: bool
) -> tuple[CutSource, HeadMap]:
    """The model without the chosen heads, and the heads that earlier prunings left in it."""
    layers = [s.heads for s in scored]
    if per_layer:
        counts = counts_per_layer(source.config, layers, choice.heads)
    else:
        heads, kv_heads = remaining(layers[0], choice.heads)
        counts = layers[0].counts(heads, kv_heads)
        if "num_attention_heads" in counts:
            refuse_indivisible(source.config, heads, source.path)
    earlier = {s.heads.layer: tuple(sorted(s.pruned)) for s in scored}
    left = renumbered(layers, earlier, choice.heads)
    return CutSource(source, choice.heads, counts), left
