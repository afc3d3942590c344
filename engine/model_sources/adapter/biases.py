"""Biases that an adapter adds, and the configuration that has them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import CheckpointError, listing
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import with_key
from models.config.model_config import ModelConfig
from models.tensor_names import ATTENTION_PROJECTIONS, MLP_PROJECTIONS

# Field of `ModelConfig` -> the projections that it gives a bias.
_FIELDS = {
    "attention_bias": ATTENTION_PROJECTIONS[:3],
    "attention_output_bias": ATTENTION_PROJECTIONS[3:],
    "mlp_bias": MLP_PROJECTIONS,
}
_KEYS = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class BiasedConfig:
    """A model with more biases: `raw` can say so unless `inexpressible` names projections."""

    config: ModelConfig
    raw: dict[str, Any]
    inexpressible: str = ""


def with_biases(base: ModelSource, modules: Collection[str]) -> BiasedConfig:
    """The configuration of `base` with a bias at least on `modules`.

    Raises `CheckpointError` for modules that have none in any graph.
    """
    leaves = {module.rpartition(".")[2] for module in modules}
    known = {leaf for names in _FIELDS.values() for leaf in names}
    if leaves - known:
        raise CheckpointError(
            f"{base.path}: the adapter gives {listing(sorted(leaves - known))} a bias (lora_bias), "
            "which these modules cannot have here."
        )
    config = base.config
    needed: dict[str, Any] = {
        name: True
        for name, names in _FIELDS.items()
        if leaves & set(names) and not getattr(config, name)
    }
    if not needed:
        return BiasedConfig(config, dict(base.raw_config))
    raw = dict(base.raw_config)
    for key in _KEYS:
        if any(name in needed for name in (key, key.replace("_bias", "_output_bias"))):
            raw = with_key(raw, key, True)
    graph = replace(config, **needed)
    try:
        written = ModelConfig.from_dict(raw)
    except ValueError:
        written = config
    # The head that stands in the file may be another than config.json says.
    written = replace(written, tie_word_embeddings=config.tie_word_embeddings)
    if all(getattr(written, name) for name in needed):
        return BiasedConfig(written, raw)
    return BiasedConfig(graph, dict(base.raw_config), listing(sorted(leaves)))
