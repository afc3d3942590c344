"""Importance as the error left when survivors make up for it.

Of every layer the units (heads, or key/value heads with all that read them) are taken out one by
one, the cheapest first, the rest updated each time (`engine.pruning.reconstruction.least_squares`).
A unit's score is what the error had grown by when it went, as a share of the layer's output; scores
never fall along the order, so that the lowest scores of a layer are always the first of its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from engine.config.choices import Granularity
from engine.pruning.calibration import dense_weight
from engine.pruning.reconstruction.layer_stream import HeadMoments, LayerStream, lone_output
from engine.pruning.reconstruction.least_squares import Regression, removal_order
from engine.pruning.scores import LayerScores, checked


def reconstruction_scores(
    blank: Sequence[LayerScores], stream: LayerStream, granularity: Granularity, ridge: float
) -> list[LayerScores]:
    """Scores of every head of the layers in `blank`, whose values are not read."""
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
            result.append(_scored(wanted[index], given, granularity))
        del model, observer
        stream.go_on(states)
    return result


def _scored(scores: LayerScores, given: Regression, granularity: Granularity) -> LayerScores:
    heads = scores.heads
    units: list[tuple[int, ...]] = [(head,) for head in sorted(scores.active)]
    if granularity == "kv-group":
        groups = sorted(heads.groups(scores.active))
        units = [
            tuple(head for head in heads.members(group) if head in scores.active)
            for group in groups
        ]
    values = torch.zeros(heads.heads, dtype=torch.float64)
    if not units:
        return replace(scores, values=values)
    order, errors = removal_order(given, [heads.output_columns(unit) for unit in units])
    for number, error in zip(order, accumulate(errors, max), strict=True):
        for head in units[number]:
            values[head] = error / len(units[number])
    return replace(scores, values=checked(values, heads.layer))
