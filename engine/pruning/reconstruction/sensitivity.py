"""Budgets across layers: how far the model strays without some units.

Layers are compared by one thing that all of them change: the divergence of the next token's
distribution from the whole model's, KL(whole | changed) in nats a token, on some calibration
tokens. A layer without its first k units, the rest repaired, is measured for k = 1, 2, 4, ...: the
layers above are run, those below are not (their output is stored). Between these k the growth
follows the layer's own error. The lower convex hull of the curve gives each unit its score, so that
taking the lowest scores of the whole model is the best split of a budget over the layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.data.batches.loader import collate
from engine.data.examples import Example
from kernels.loss.linear_cross_entropy import linear_cross_entropy
from kernels.loss.linear_distillation import linear_distillation
from models.decoder import DISTILLATION_TOKENS, Decoder
from models.layers.linear import Linear

SENSITIVITY_TOKENS = 1024


def first_tokens(examples: Sequence[Example], most: int | None = None) -> list[Example]:
    """The first examples, up to `most` tokens (`SENSITIVITY_TOKENS`); at least one."""
    chosen: list[Example] = []
    tokens, most = 0, SENSITIVITY_TOKENS if most is None else most
    for example in examples:
        if chosen and tokens + len(example) > most:
            break
        chosen.append(example)
        tokens += len(example)
    return chosen


def set_aside(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to measure a repair on, at most a quarter of all tokens, and those to fit it to.

    On its own rows a fit of many columns looks as if nothing were lost. A lone example is both.
    """
    most = min(SENSITIVITY_TOKENS, sum(map(len, examples)) // 4)
    measured = first_tokens(examples, most)
    return measured, list(examples[len(measured) :]) or measured


class PrefixDivergence:
    """Runs a whole model from one layer on, and tells how far it strays."""

    @torch.no_grad()
    def __init__(self, model: Decoder, examples: Sequence[Example]) -> None:
        """Uses the `first_tokens` of the examples."""
        self.model, count = model, len(model.layers)
        self._batch = collate(first_tokens(examples)).to(model.device, model.ids_device)
        self._x: Tensor = model.model.embed_tokens(self._batch.input_ids)
        self._first, self._layer, self._count = self._x, 0, count
        self._known = self._last_states(range(count))
        self._whole_loss = self._loss(self._known)

    def _last_states(self, layers: Iterable[int]) -> Tensor:
        """What the head reads at the trained tokens (n, H), these layers run from here."""
        states = self.model.continued(self._x, self._batch, layers)
        last: Tensor = self.model.model.norm(states.index_select(0, self._batch.trained))
        return last

    @torch.no_grad()
    def straying(self, layers: Iterable[int]) -> float:
        """Nats a token, with these layers run from here."""
        states, head = self._last_states(layers), self.model.head_weight()
        total = linear_distillation(states, head, self._known, head, 1.0, DISTILLATION_TOKENS)
        return float(total.double()) / max(len(states), 1)

    @torch.no_grad()
    def cost(self, layers: Iterable[int]) -> tuple[float, float]:
        """What the loss grows by, in nats a token and at least 0, and how far the model strays."""
        states, head = self._last_states(layers), self.model.head_weight()
        count = max(len(states), 1)
        total = linear_distillation(states, head, self._known, head, 1.0, DISTILLATION_TOKENS)
        grown = self._loss(states) - self._whole_loss
        return max(float(grown.double()) / count, 0.0), float(total.double()) / count

    def _loss(self, states: Tensor) -> Tensor:
        """The sum over the trained tokens."""
        return linear_cross_entropy(states, self.model.head_weight(), self._batch.targets, 1.0)

    @torch.no_grad()
    def without(self, linear: Linear, weight: Tensor, shift: Tensor) -> float:
        """Nats a token, with `weight` in a projection of this layer and `shift` on its bias."""
        before, bias = linear.weight, linear.bias
        linear.set_weight(weight.to(self._x.device, self._x.dtype))
        if bias is not None:
            bias.data += shift.to(bias.device, bias.dtype)
        strayed = self.straying(range(self._layer, self._count))
        linear.set_weight(before)
        if bias is not None:
            bias.data -= shift.to(bias.device, bias.dtype)
        return strayed

    def go_on(self) -> None:
        """Run one layer, and stand before the next."""
        self._x = self.model.continued(self._x, self._batch, [self._layer])
        self._layer += 1

    def run(self, layers: Iterable[int]) -> None:
        """Go through these layers, whichever they are."""
        self._x = self.model.continued(self._x, self._batch, layers)

    def restart(self) -> None:
        """Stand before the first layer again."""
        self._x, self._layer = self._first, 0


def measured_counts(units: int) -> list[int]:
    """Numbers of units that are measured: powers of two, and all but one."""
    powers = [1 << power for power in range(units.bit_length()) if 1 << power < units - 1]
    return [*powers, max(units - 1, 1)]


def growth_of_units(errors: Sequence[float], measured: Mapping[int, float]) -> list[float]:
    """What each unit, in the order of removal, adds to the divergence: never falling.

    `errors` grow by unit. Where a count was not measured, divergence follows the error.
    """
    totals = [0.0]
    for error in errors:
        totals.append(totals[-1] + error)
    known = {0: 0.0, **measured}
    counts = sorted(known)
    curve = []
    for count in range(len(errors) + 1):
        if count in known:
            curve.append(known[count])
            continue
        right = min(bisect_left(counts, count), len(counts) - 1)
        low, high = counts[right - 1], counts[right]
        span = max(totals[high] - totals[low], 1e-300)
        share = (totals[count] - totals[low]) / span
        curve.append(known[low] + share * (known[high] - known[low]))
    return _hull_steps(curve)


def _hull_steps(curve: Sequence[float]) -> list[float]:
    """Slopes, point by point, of the lower convex hull of a curve."""
    hull: list[int] = []
    for point in range(len(curve)):
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], point):
            hull.pop()
        hull.append(point)
    steps = []
    for start, end in pairwise(hull):
        steps += [_slope(curve, start, end)] * (end - start)
    return steps


def _slope(curve: Sequence[float], start: int, end: int) -> float:
    return (curve[end] - curve[start]) / (end - start)
