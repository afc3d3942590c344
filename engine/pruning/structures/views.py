"""Model sources without some channels of feed-forward parts, or without layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import LayersView, RenamedView
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.heads_per_layer import PER_LAYER
from models.config.model_config import ModelConfig
from models.tensor_layout import path_in_file

_LISTS = ("layer_types", "no_rope_layers", *PER_LAYER)
"""Keys of the configuration with a value for each layer."""


class NarrowSource(LayersView):
    """A model source whose feed-forward parts have the channels `staying` alone, layer by layer."""

    def __init__(self, base: ModelSource, staying: Mapping[int, Tensor]) -> None:
        """Every layer keeps the same number of channels."""
        super().__init__(base)
        self._cuts: dict[str, tuple[int, Tensor]] = {}
        for layer, index in staying.items():
            path = f"model.layers.{layer}.mlp"
            for leaf, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                self._cuts[path_in_file(base.config, f"{path}.{leaf}.weight")] = dim, index
                if dim == 0:
                    self._cuts[path_in_file(base.config, f"{path}.{leaf}.bias")] = dim, index
        width = len(next(iter(staying.values())))
        self.raw_config = with_text_config(base.raw_config, {"intermediate_size": width})
        self.config = ModelConfig.from_dict(self.raw_config)

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, without the rows or columns of channels that went."""
        tensor = self.base.tensor(name)
        if name not in self._cuts:
            return tensor
        return tensor.index_select(*self._cuts[name])

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """The stored codes; None for a tensor that is cut."""
        return None if name in self._cuts else self.base.codes(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `tensor` has."""
        shape = self.base.shape(name)
        if name not in self._cuts:
            return shape
        dim, index = self._cuts[name]
        return tuple(len(index) if axis == dim else size for axis, size in enumerate(shape))


class ShallowSource(RenamedView):
    """A model source of the layers `staying` alone, numbered anew."""

    def __init__(self, base: ModelSource, staying: Sequence[int]) -> None:
        """Raises `ConfigError` where no configuration describes these layers."""
        prefix = path_in_file(base.config, "model.layers.")
        number = {f"{prefix}{old}.": f"{prefix}{new}." for new, old in enumerate(staying)}
        outer: dict[str, str] = {}
        for name in base.names():
            if not name.startswith(prefix):
                outer[name] = name
                continue
            head = prefix + name.removeprefix(prefix).partition(".")[0] + "."
            if head in number:
                outer[number[head] + name.removeprefix(head)] = name
        super().__init__(base, outer)
        self.raw_config = shallow_config(base, staying)
        self.config = ModelConfig.from_dict(self.raw_config)


def with_text_config(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values for its decoder."""
    nested = raw.get("text_config")
    if isinstance(nested, dict):
        return {**raw, "text_config": {**nested, **changes}}
    return {**raw, **changes}


def shallow_config(base: ModelSource, staying: Sequence[int]) -> dict[str, Any]:
    """The configuration of the layers `staying` alone. Raises `ConfigError`."""
    config, raw = base.config, base.raw_config
    inner = raw.get("text_config")
    own = inner if isinstance(inner, dict) else raw
    changes: dict[str, Any] = {"num_hidden_layers": len(staying)}
    for key in _LISTS:
        if isinstance(own.get(key), list) and len(own[key]) == config.num_hidden_layers:
            changes[key] = [own[key][layer] for layer in staying]
    if len(set(config.layer_types)) > 1:
        changes["layer_types"] = [config.layer_types[layer] for layer in staying]
    if len(set(config.rope_layers)) > 1:
        changes["no_rope_layers"] = [int(config.rope_layers[layer]) for layer in staying]
    if any(config.sparse_layers) and "mlp_only_layers" in own:
        dense = [new for new, old in enumerate(staying) if not config.sparse_layers[old]]
        changes |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    result = with_text_config(raw, changes)
    left = ModelConfig.from_dict(result)
    for field in ("layer_types", "rope_layers", "sparse_layers", *PER_LAYER):
        before, after = getattr(config, field), getattr(left, field)
        if tuple(before[layer] for layer in staying if before) != after:
            raise ConfigError(
                f"{base.path}: without these layers {field} would be read as {after}: a "
                f"configuration of {config.model_type} cannot say it otherwise. Protect layers "
                "with --protect so that what is left follows the family's pattern."
            )
    return result
