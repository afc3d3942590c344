"""Experts of mixtures: which go, and a model source without them.

An expert's mass is the sum of the router's weights over the calibration tokens that chose it, as a
share of its layer's. Every mixture gives up as many, the least first, so that one `num_experts`
describes the model. The tokens of an expert that went go to their next choice: the router's softmax
is over what is left.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import RenamedView
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.structures.views import with_text_config
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.layers.moe import MoESaved
from models.layers.observer import LayerObserver
from models.tensor_layout import path_in_file


class _Mass(LayerObserver):
    """Adds up the router's weights by expert."""

    def __init__(self, experts: int, device: torch.device) -> None:
        self.mass = torch.zeros(experts, dtype=torch.float64, device=device)

    def mlp_ran(self, layer: int, saved: Any) -> None:
        """Add the choices for these tokens."""
        assert isinstance(saved, MoESaved)
        routing = saved.experts.routing
        self.mass.index_add_(0, routing.experts.flatten(), routing.weights.flatten().double())


def routed_mass(stream: LayerStream) -> dict[int, Tensor]:
    """The share (E,) of every expert, by layer, of layers that are mixtures."""
    config, result = stream.source.config, dict[int, Tensor]()
    for index in range(config.num_hidden_layers):
        model = stream.open(index)
        if not config.sparse_layers[index]:
            stream.go_on(stream.run(model))
            continue
        observer = _Mass(config.num_experts, model.device)
        stream.go_on(stream.run(model, observer))
        result[index] = (observer.mass / observer.mass.sum().clamp(min=1e-300)).cpu()
        del model
    return result


def experts_to_go(config: ModelConfig, fraction: float) -> int:
    """How many experts each mixture loses. Raises `ConfigError` where that cannot be."""
    if not any(config.sparse_layers):
        raise ConfigError("--what experts: this model has no mixture of experts.")
    count = math.floor(config.num_experts * fraction + 0.5)
    most = config.num_experts - config.num_experts_per_tok
    if not 0 < count <= most:
        raise ConfigError(
            f"--fraction {fraction:g} of {config.num_experts} experts is {count}; a token is sent "
            f"to {config.num_experts_per_tok}, so from 1 to {most} can go."
        )
    return count


class FewerExpertsSource(RenamedView):
    """A model source whose mixtures have the experts `staying` alone, numbered anew."""

    def __init__(self, base: ModelSource, staying: Mapping[int, Tensor]) -> None:
        """Every mixture keeps the same number of experts."""
        outer: dict[str, str] = {}
        super().__init__(base, outer)
        self._rows: dict[str, Tensor] = {}
        prefix = re.escape(path_in_file(base.config, "model.layers."))
        known = re.compile(rf"({prefix}(\d+)\.mlp\.)(gate\.weight|experts\.(?:(\d+)\.)?(.+))")
        for name in base.names():
            match = known.fullmatch(name)
            index = None if match is None else staying.get(int(match[2]))
            if match is None or index is None:
                outer[name] = name
            elif match[4] is None:  # the router, or all experts in one tensor
                outer[name], self._rows[name] = name, index
            elif int(match[4]) in index.tolist():
                number = index.tolist().index(int(match[4]))
                outer[f"{match[1]}experts.{number}.{match[5]}"] = name
        count = len(next(iter(staying.values())))
        own = base.raw_config.get("text_config")
        keys = ("num_experts", "num_local_experts")
        given = own if isinstance(own, dict) else base.raw_config
        changes = {key: count for key in keys if key in given} or {"num_experts": count}
        self.raw_config = with_text_config(base.raw_config, changes)
        self.config = ModelConfig.from_dict(self.raw_config)

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` of the model that is left."""
        tensor = super().tensor(name)
        return tensor if name not in self._rows else tensor.index_select(0, self._rows[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        shape = super().shape(name)
        return shape if name not in self._rows else (len(self._rows[name]), *shape[1:])

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """Its codes, if it is stored in codes and whole."""
        return None if name in self._rows else super().codes(name)
