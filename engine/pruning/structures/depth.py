"""Whole layers: which go, and the repair of the layers before them.

    l2-reconstruction   what the loss on the trained tokens grows by without the layer, by running
                        what is left (as Shortened LLaMA, Kim et al. 2024, arXiv 2402.02834, ranks
                        blocks); among layers without which it does not grow, how far the model
                        strays. All are tried, the best goes, and the next best few are tried again
                        without it, until enough are out
    cosine              1 - cos(x, y) of the layer's input and output, mean over tokens (ShortGPT,
                        Men et al. 2024, arXiv 2403.03853); one layer in memory at a time
    random              a baseline

The repair: let a be what down_proj of the last layer before a gap reads, y its layer's output, and
t what the layers of the gap would have made of y. Then W += E[(t - y) a^T] (E[a a^T] + r I)^-1 in
down_proj is the best it can do in their place, with the ridge towards the weights as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.least_squares import InputMoments, Regression, solved
from engine.pruning.reconstruction.repair import Change
from engine.pruning.reconstruction.sensitivity import PrefixDivergence
from engine.pruning.structures.channels import channels
from models.decoder import Decoder
from models.layers.mlp import MLP
from models.layers.observer import LayerObserver
from models.tensor_layout import path_in_file

_TRIED_AGAIN = 5


def may_go(layer: int, left: Collection[int], needed: frozenset[int]) -> bool:
    """Whether a layer may go of those that are left: of the `needed` one has to stay."""
    return layer not in needed or len(needed.intersection(left)) > 1


def layers_by_loss(
    divergence: PrefixDivergence,
    layers: int,
    count: int,
    protected: frozenset[int],
    needed: frozenset[int] = frozenset(),
) -> list[tuple[int, float]]:
    """`count` layers in the order in which they go, with nats a token that they bring it to."""
    left, order = list(range(layers)), list[tuple[int, float]]()
    known: dict[int, tuple[float, float]] = {}
    tried = [layer for layer in left if layer not in protected]
    while len(order) < count:
        free = {layer for layer in tried if may_go(layer, left, needed)}
        costs = dict(_costs(divergence, left, free))
        known |= costs
        best = min(costs, key=lambda layer: (costs[layer], layer))
        order.append((best, costs[best][0]))
        left.remove(best)
        del known[best]
        tried = sorted(known, key=lambda layer: (known[layer], layer))[:_TRIED_AGAIN]
    return order


def _costs(
    divergence: PrefixDivergence, left: Sequence[int], tried: set[int]
) -> Iterator[tuple[int, tuple[float, float]]]:
    """What the model of the layers `left` costs without each of those tried."""
    divergence.restart()
    for position, layer in enumerate(left):
        if layer in tried:
            yield layer, divergence.cost(left[position + 1 :])
        divergence.run([layer])


def layers_by_cosine(stream: LayerStream, layers: int) -> list[float]:
    """1 - cos(x, y) of every layer, the mean over tokens."""
    result = []
    for index in range(layers):
        model = stream.open(index)
        states = stream.run(model)
        cosine = torch.cosine_similarity(stream.states.double(), states.double(), dim=1)
        result.append(float(1 - cosine.mean()))
        stream.go_on(states)
        del model
    return result


class _Residual(LayerObserver):
    """Products of what is missing of a lone layer's output and what its down_proj reads."""

    def __init__(self, missing: Tensor, width: int) -> None:
        self.missing, self._start = missing, 0
        self.moments = InputMoments.empty(width, missing.device)
        self.products = torch.zeros(
            missing.shape[1], width, dtype=torch.float64, device=missing.device
        )

    def mlp_ran(self, layer: int, saved: Any) -> None:
        """Add a batch, whose tokens follow those of the one before."""
        a = channels(saved)
        part = self.missing[self._start : self._start + len(a)]
        self._start += len(a)
        self.moments.add(a)
        self.products.addmm_(part.double().mT, a.double())


class GapRepair:
    """Fits down_proj of the layers before gaps; `changes` and `told` hold what came of it."""

    def __init__(self, stream: LayerStream, ridge: float, dtype: torch.dtype | None) -> None:
        """`dtype` is what will be written, by default each tensor's own."""
        self._stream, self._ridge, self._dtype = stream, ridge, dtype
        self.changes: dict[str, Change] = {}
        self.told: list[dict[str, Any]] = []

    @torch.no_grad()
    def run(self, layers: int, pruned: Sequence[int]) -> None:
        """Fit every dense layer after which layers go, in the order of the model."""
        pruned_layers = set(pruned)
        for index in range(max(pruned)):
            if index in pruned_layers:
                continue
            model = self._stream.open(index)
            read = self._stream.mixed(model)
            states = self._stream.finished(model, read)
            gap = list(takewhile(pruned_layers.__contains__, range(index + 1, layers)))
            mlp = model.layers[0].mlp
            if gap and isinstance(mlp, MLP):
                wanted = self._through(states, gap)
                observer = _Residual(wanted - states, mlp.down_proj.in_features)
                self._stream.finished(model, read, observer)
                self._fit(index, model, mlp, observer)
                states = self._stream.finished(model, read)
                left = float((wanted - states).double().square().mean())
                self.told[-1]["error_repaired"] = left
            self._stream.go_on(states)
            del model, mlp, read

    def _through(self, states: Tensor, gap: Sequence[int]) -> Tensor:
        """What the layers of a gap make of these states."""
        before = self._stream.states
        for index in gap:
            self._stream.go_on(states)
            states = self._stream.run(self._stream.open(index))
        self._stream.go_on(before)
        return states

    def _fit(self, index: int, model: Decoder, mlp: MLP, observer: _Residual) -> None:
        source, down, missing = self._stream.source, mlp.down_proj, observer.missing
        name = path_in_file(source.config, f"model.layers.{index}.mlp.down_proj.weight")
        weight = source.tensor(name).to(missing.device).double()
        given = Regression(weight, observer.moments, self._ridge)
        weight = weight + solved(given, observer.products / observer.moments.tokens)
        change = Change(weight.to(self._dtype or source.dtype(name)).cpu())
        self.changes[name] = change
        down.set_weight(change.values.to(model.device, model.dtype))
        alone = float(missing.double().square().mean())
        self.told.append({"layer": index, "error_removed": alone})
