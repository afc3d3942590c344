"""Adapters that start as a part of the weights: PiSSA, OLoRA, LoftQ.

While a model is loaded, the weight W (out, in) of every adapted projection is divided into a pair
and what is left of it (`engine.model_sources.adapter.initial`), and the pair is what training
begins with. The files of the model stay as they are.

PiSSA and OLoRA leave W - s B0 A0, so what was learnt is W + s (B A - B0 A0), and that is a plain
adapter of twice the rank on W itself: A' = [A; A0], B' = [B, -B0]. It is what is saved, as PEFT
converts such adapters. LoftQ leaves quantised values, which PEFT makes again from W as it loads an
adapter whose configuration says so; its pairs are saved as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.model_sources.adapter.config import AdapterConfig, scale_of
from engine.model_sources.adapter.initial import initial_pair
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import ModelSourceView
from engine.training.adapters.selection import Projected, Selection, selection
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from kernels.runtime.random import derived_seed
from models.adapters import PairSize
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.linear import Linear

Parts = tuple[Tensor, ...]
CHANGES_BASE = ("pissa", "olora", "loftq")
"""Starts that take something from the base, by the beginning of their names."""
_DECOMPOSED = 5
"""Matrices in fp32 that dividing one takes at once: itself, its factors and what is left."""


def changes_base(config: TrainConfig) -> bool:
    """Whether the adapter starts as a part of the weights."""
    return not config.every_weight and config.init_lora_weights.startswith(CHANGES_BASE)


def check_start(config: TrainConfig, selected: Selection) -> None:
    """Raises `ConfigError` where the start is not defined for what is adapted."""
    if not changes_base(config):
        return
    name = config.init_lora_weights
    if any(projection.is_expert for projection in selected):
        raise ConfigError(
            f"init_lora_weights {name} divides matrices, and the experts of this model are "
            "parameters of many, for which PEFT has no such start. Adapt the attention alone with "
            "--target-modules attn, or leave it out."
        )
    for projection, size in selected.items():
        least = min(projection.rows, projection.columns)
        if size.rank > least:
            raise ConfigError(
                f"init_lora_weights {name}: {projection.stored} is {projection.rows} x "
                f"{projection.columns}, so that it has no part of rank {size.rank}. Give a "
                f"--lora-rank of at most {least}."
            )


def start_bytes(config: TrainConfig, model: ModelConfig) -> tuple[int, int]:
    """Bytes of host memory for the first pairs, as long as the run lasts, and for dividing one."""
    if not changes_base(config):
        return 0, 0
    selected = selection(config, model)
    pairs = sum(size.rank * (p.rows + p.columns) for p, size in selected.items())
    largest = max(p.rows * p.columns for p in selected)
    return (0 if config.init_lora_weights == "loftq" else 4 * pairs), 4 * _DECOMPOSED * largest


class DividedSource(ModelSourceView):
    """A model source without the parts of its weights that an adapter starts as.

    `pairs` has what was taken of every weight that was read, by the graph's path.
    """

    def __init__(self, base: ModelSource, config: TrainConfig) -> None:
        super().__init__(base)
        self._run = config
        selected = selection(config, base.config)
        self._adapted: dict[str, tuple[Projected, PairSize]] = {
            f"{projection.stored}.weight": (projection, size)
            for projection, size in selected.items()
        }
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def tensor(self, name: str) -> Tensor:
        """The tensor, or what is left of it."""
        weight = self.base.tensor(name)
        if name not in self._adapted:
            return weight
        projection, size = self._adapted[name]
        scale = scale_of(size.alpha, size.rank, self._run.use_rslora)
        start = self._run.init_lora_weights
        with torch.random.fork_rng(devices=[]):  # a randomised decomposition draws numbers
            torch.manual_seed(derived_seed(self._run.seed, list(self._adapted).index(name)))
            rest, a, b = initial_pair(
                weight, start, size.rank, scale, {"loftq_iter": self._run.loftq_iter}
            )
        self.pairs[projection.path] = (a, b)
        return rest

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """None for a weight that is divided: it is quantised anew."""
        return None if name in self._adapted else self.base.codes(name)


def with_start(config: TrainConfig, source: ModelSource) -> ModelSource:
    """The source that the model is loaded from."""
    return DividedSource(source, config) if changes_base(config) else source


@torch.no_grad()
def start_pairs(model: Decoder, config: TrainConfig, source: ModelSource) -> dict[str, Parts]:
    """Give the new pairs of `model` their first values; returns those to subtract in the end.

    `source` is what the model was loaded from.
    """
    if not config.every_weight and config.init_lora_weights == "gaussian":
        _draw(model, config.seed)
    if not isinstance(source, DividedSource):
        return {}
    for path, (a, b) in source.pairs.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, Linear)
        for parameter, value in ((linear.lora_A, a), (linear.lora_B, b)):
            assert isinstance(parameter, nn.Parameter)
            parameter.copy_(value)
    return {} if config.init_lora_weights == "loftq" else dict(source.pairs)


def _draw(model: Decoder, seed: int) -> None:
    """A from a normal distribution of deviation 1 / r, as PEFT's "gaussian"; B stays zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A") and parameter.requires_grad:
            deviation = 1.0 / parameter.shape[-2]
            drawn = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
            parameter.copy_(drawn)


def as_plain(
    settings: AdapterConfig, tensors: Mapping[str, Parts], first: Mapping[str, Parts]
) -> tuple[AdapterConfig, dict[str, Parts]]:
    """The adapter on the model's own weights: of twice the rank where pairs `first` were taken."""
    if not first:
        return settings, dict(tensors)
    doubled: dict[str, Parts] = {
        path: (torch.cat((a.cpu(), first[path][0])), torch.cat((b.cpu(), -first[path][1]), 1))
        for path, (a, b, *_) in tensors.items()
    }
    factor = math.sqrt(2) if settings.use_rslora else 2.0
    return (
        replace(
            settings,
            r=2 * settings.r,
            lora_alpha=factor * settings.lora_alpha,
            rank_pattern={key: 2 * rank for key, rank in settings.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in settings.alpha_pattern.items()},
        ),
        doubled,
    )
