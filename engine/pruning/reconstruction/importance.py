"""Importance as the error left when survivors make up for it.

Of every layer the units (heads, or key/value heads with all that read them) are taken out one by
one, the cheapest first, the rest updated each time (`engine.pruning.reconstruction.least_squares`).
Where every key/value head must give up as many (`level`), they take turns: a head is the cheapest
given those that go before it in such a cut, not given others that stay.
A unit's score is what the error had grown by when it went, as a share of the layer's output; scores
rise along the order, so that the lowest scores of a layer are always the first of its order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.config.choices import Granularity
from engine.pruning.calibration import dense_weight
from engine.pruning.reconstruction.layer_stream import (
    HeadMoments,
    LayerStream,
    lone_output,
    output_of,
)
from engine.pruning.reconstruction.least_squares import Regression, removal_order, repaired
from engine.pruning.reconstruction.sensitivity import (
    PrefixDivergence,
    growth_of_units,
    measured_counts,
)
from engine.pruning.scores import LayerScores, checked


def reconstruction_scores(
    blank: Sequence[LayerScores],
    stream: LayerStream,
    granularity: Granularity,
    ridge: float,
    divergence: PrefixDivergence | None = None,
    *,
    level: bool = False,
    repairs: bool = True,
) -> list[LayerScores]:
    """Scores of every head of the layers in `blank`, whose values are not read.

    With `divergence` they are how far the model strays, in nats a token: with what is left updated
    as it will be, or as it is where nothing `repairs`.
    """
    wanted = {scores.heads.layer: scores for scores in blank}
    result = []
    for index in range(max(wanted) + 1):
        model = stream.open(index)
        observer = HeadMoments(model)
        states = stream.run(model, observer)
        if index in wanted:
            linear = lone_output(model)[1]
            weight = dense_weight(linear, torch.float32)
            given = Regression(weight, observer.moments, ridge, linear.bias is not None)
            units = _units(wanted[index], granularity)
            groups = _groups(wanted[index], units) if level and granularity == "head" else None
            result.append(_scored(wanted[index], given, units, groups, divergence, repairs))
        del model, observer
        stream.go_on(states)
        if divergence is not None:
            divergence.go_on()
    return result


def _scored(
    scores: LayerScores,
    given: Regression,
    units: list[tuple[int, ...]],
    groups: list[int] | None,
    divergence: PrefixDivergence | None,
    repairs: bool,
) -> LayerScores:
    heads = scores.heads
    values = torch.zeros(heads.heads, dtype=torch.float64)
    if not units:
        return replace(scores, values=values)
    columns = [heads.output_columns(unit) for unit in units]
    order, errors = removal_order(given, columns, groups)
    grown = errors
    if divergence is not None:
        going = [columns[number] for number in order]
        measured = _measured(scores, given, going, divergence, repairs)
        grown = growth_of_units(errors, measured)
    for number, value in zip(order, _rising(grown), strict=True):
        for head in units[number]:
            values[head] = value / len(units[number])
    return replace(scores, values=checked(values, heads.layer))


def _rising(values: Sequence[float]) -> Iterator[float]:
    """The values, each raised above the one before it where it is not."""
    last = -math.inf
    for value in values:
        last = max(value, math.nextafter(last, math.inf))
        yield last


def _units(scores: LayerScores, granularity: Granularity) -> list[tuple[int, ...]]:
    """The heads that go together."""
    heads, active = scores.heads, scores.active
    if granularity == "head":
        return [(head,) for head in sorted(active)]
    groups = (heads.members(group) for group in sorted(heads.groups(active)))
    return [tuple(head for head in group if head in active) for group in groups]


def _groups(scores: LayerScores, units: list[tuple[int, ...]]) -> list[int]:
    """The key/value head of each unit of one head."""
    return [next(iter(scores.heads.groups(set(unit)))) for unit in units]


def _measured(
    scores: LayerScores,
    given: Regression,
    order: list[Tensor],
    divergence: PrefixDivergence,
    repairs: bool,
) -> dict[int, float]:
    """Units removed -> how far the model strays, the rest of the layer as it will be."""
    linear = output_of(divergence.model, scores.heads)
    result = {}
    for count in measured_counts(len(order)):
        if count == len(order):  # a layer of one unit: nothing would be left
            continue
        going, staying = torch.cat(order[:count]), torch.cat(order[count:])
        values = given.weight[:, staying].double()
        shift = values.new_zeros(len(values))
        if repairs:
            values, shift = repaired(given, staying, going)
        weight = torch.zeros_like(given.weight, dtype=torch.float64)
        weight[:, staying] = values
        result[count] = divergence.without(linear, weight, shift)
    return result
