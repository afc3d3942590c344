"""Channels of feed-forward parts: which go, and repair of what is left.

Channel j of y = down(silu(gate) * up) is row j of gate and up and column j of down. Every layer
gives up as many, so that one `intermediate_size` describes the model and every program loads it.
Layers are taken in order, each measured on what the repaired ones before it give:

    l2-reconstruction   the channels whose loss the others can make up for, in rounds: those of a
                        round go together, and the rest is updated before the next
    l2-output           |down_j| rms(a_j), the size of what the channel adds
    l2-weights          sqrt(|gate_j g|^2 + |up_j g|^2 + |down_j|^2), g the gain of the norm before

The repair is that of heads, of down_proj (`engine.pruning.reconstruction.least_squares`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config.choices import Metric
from engine.config.tasks.pruning import DEFAULT_RIDGE
from engine.errors import ConfigError
from engine.pruning.calibration import dense_weight
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.least_squares import (
    InputMoments,
    Regression,
    cheapest_columns,
    repaired,
)
from engine.pruning.reconstruction.repair import Change, errors_of
from kernels.elementwise.swiglu import swiglu_forward
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.linear import Linear
from models.layers.mlp import MLP, MLPSaved
from models.layers.observer import LayerObserver
from models.tensor_layout import path_in_file

MULTIPLE = 8
"""What is left of the channels is a multiple of this: matrix units want whole rows of 16 bytes."""


class ChannelMoments(LayerObserver):
    """Moments of what down_proj of a lone layer reads."""

    def __init__(self, width: int, model: Decoder) -> None:
        self.moments = InputMoments.empty(width, model.device)

    def mlp_ran(self, layer: int, saved: Any) -> None:
        """Add what every channel gave for these tokens."""
        self.moments.add(channels(saved))


def channels(saved: MLPSaved) -> Tensor:
    """What down_proj reads (N, I)."""
    assert saved.inner is not None
    gate, up = saved.inner.gate_up()
    return swiglu_forward(gate, up)


def channels_to_go(config: ModelConfig, fraction: float) -> int:
    """How many channels each layer loses. Raises `ConfigError` where none can."""
    if any(config.sparse_layers):
        raise ConfigError(
            "--what mlp takes channels out of dense feed-forward parts, and this model has "
            "mixtures of experts. Use --what heads or --what layers."
        )
    width = config.intermediate_size
    left = max(MULTIPLE, MULTIPLE * math.floor(width * (1 - fraction) / MULTIPLE + 0.5))
    if left >= width:
        raise ConfigError(
            f"--fraction {fraction:g} of {width} channels is less than {MULTIPLE}, which is what "
            f"goes at a time. Give at least {MULTIPLE / width:.4f}."
        )
    return width - left


class ChannelPruning:
    """Chooses channels layer after layer; `staying`, `changes` and `told` hold what came of it."""

    def __init__(
        self, stream: LayerStream, metric: Metric, ridge: float | None, dtype: torch.dtype | None
    ) -> None:
        """Without a `ridge` nothing is repaired. `dtype` is what will be written."""
        self._stream, self._metric, self._ridge, self._dtype = stream, metric, ridge, dtype
        self._generator = torch.Generator().manual_seed(0)
        self.staying: dict[int, Tensor] = {}
        self.changes: dict[str, Change] = {}
        self.told: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, count: int, seed: int = 0) -> None:
        """Take `count` channels out of every layer."""
        self._generator.manual_seed(seed)
        layers = self._stream.source.config.num_hidden_layers
        for index in range(layers):
            model = self._stream.open(index)
            mlp = model.layers[0].mlp
            assert isinstance(mlp, MLP)
            observer = ChannelMoments(mlp.down_proj.in_features, model)
            read = self._stream.mixed(model)
            self._stream.finished(model, read, observer)
            self._cut(index, model, observer.moments, count)
            if index + 1 < layers:
                self._stream.go_on(self._stream.finished(model, read))
            del model, mlp, read

    def _cut(self, index: int, model: Decoder, moments: InputMoments, count: int) -> None:
        mlp = model.layers[0].mlp
        assert isinstance(mlp, MLP)
        down, name = mlp.down_proj, f"model.layers.{index}.mlp.down_proj"
        ridge = DEFAULT_RIDGE if self._ridge is None else self._ridge
        given = Regression(self._read(f"{name}.weight"), moments, ridge, down.bias is not None)
        going = self._chosen(given, model, count)
        stay = torch.ones(down.in_features, dtype=torch.bool)
        stay[going.cpu()] = False
        staying = torch.nonzero(stay).flatten().to(going.device)
        self.staying[index] = staying.cpu()
        after = given.weight.double().clone()
        after[:, going] = 0.0
        if self._ridge is not None:
            after, shift = self._repaired(given, staying, going, name)
            if down.bias is not None:
                down.bias.data += shift.to(down.bias.device, down.bias.dtype)
        down.set_weight(after.to(model.device, model.dtype))
        self.told.append(
            {"layer": index, "channels": down.in_features, "pruned": sorted(going.tolist())}
            | errors_of(given, going, given.weight - after)
        )

    def _chosen(self, given: Regression, model: Decoder, count: int) -> Tensor:
        """The columns that go."""
        width = given.weight.shape[1]
        if self._metric == "l2-reconstruction":
            return cheapest_columns(given, count)
        if self._metric == "random":
            scores = torch.rand(width, generator=self._generator, dtype=torch.float64)
        elif self._metric == "l2-output":
            sizes = given.moments.second(False).diagonal()
            scores = given.weight.square().sum(0) * sizes
        else:
            scores = _weight_sizes(given.weight, model)
        return scores.topk(count, largest=False).indices.to(given.weight.device)

    def _repaired(
        self, given: Regression, staying: Tensor, going: Tensor, name: str
    ) -> tuple[Tensor, Tensor]:
        """The weight as it will be written, zero where channels went, and the bias's shift."""
        source = self._stream.source
        there = path_in_file(source.config, f"{name}.weight")
        values, shift = repaired(given, staying, going)
        after = torch.zeros_like(given.weight)
        after[:, staying] = values
        change = Change(after.to(self._dtype or source.dtype(there)).cpu())
        self.changes[there] = change
        if given.centred:
            bias = path_in_file(source.config, f"{name}.bias")
            moved = (self._read(f"{name}.bias") + shift).to(change.values.dtype)
            self.changes[bias] = Change(moved.cpu())
        return change.values.double().to(after.device), shift

    def _read(self, name: str) -> Tensor:
        """A tensor of the source, in float64 on the device."""
        source = self._stream.source
        there = path_in_file(source.config, name)
        tensor = source.tensor(there).to(self._stream.device).double()
        source.release(there)
        return tensor


def _weight_sizes(down: Tensor, model: Decoder) -> Tensor:
    """Squares of the channels' weights (I,)."""
    layer = model.layers[0]
    assert isinstance(layer.mlp, MLP)
    gain = layer.post_attention_layernorm.weight.double()
    gain = gain + 1 if model.config.zero_centered_norm else gain
    rows: Sequence[Linear] = (layer.mlp.gate_proj, layer.mlp.up_proj)
    read = sum((dense_weight(linear, torch.float32) * gain).square().sum(1) for linear in rows)
    return down.square().sum(0) + read
