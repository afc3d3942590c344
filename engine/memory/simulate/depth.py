"""The step of a deep model, from steps of shallow ones.

The bytes of every segment of a step are linear in the number of layers, or of periods where layers
differ, and where checkpointing policies are mixed in that of each policy. So a few layers of each
policy, and a few more in its turn, give the step of any number of them, to the byte (a test
compares it with the whole).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from engine.config.train_config import TrainConfig
from engine.memory.simulate.meter import Peak
from engine.memory.simulate.step import SimulatedStep
from engine.memory.simulate.stored_model import StoredModel
from engine.training.adapters.selection import layers_are_alike
from engine.training.trainable import decoded_layers
from models.config.model_config import ModelConfig
from models.layers.context import layer_policies

_FEW_LAYERS = (4, 5)

Simulation = Callable[[ModelConfig, TrainConfig], SimulatedStep]
"""Simulates a step of a model under these settings."""


def step_of_layers(
    model: ModelConfig, config: TrainConfig, simulate: Simulation, whole: bool
) -> SimulatedStep:
    """A step of the run: of the `whole` model, or from shallow ones where that is exact.

    Raises `ValueError` where the checkpointing policies are not those of the layers.
    """
    layers, period = model.num_hidden_layers, model.period
    policies = layer_policies(config.gradient_checkpointing, layers)
    runs = [(policy, len(list(same))) for policy, same in groupby(policies)]
    counts = [count for _, count in runs]
    decoded = decoded_layers(config, layers)
    some = 0 < decoded < layers
    few = _FEW_LAYERS if period == 1 else (2 * period, 3 * period)
    if not layers_are_alike(config, model):
        return simulate(model, config)
    config = config.model_copy(update={"layers": None})  # all of them, or it would not be alike
    uneven = period > 1 and (some or len(runs) > 1)
    uneven |= isinstance(model, StoredModel) and not model.is_even
    if whole or max(counts) <= few[1] + 1 or layers % period or uneven:
        return simulate(model, config)

    def shallow(shape: Sequence[int]) -> SimulatedStep:
        """A step of a model with so many layers of each checkpointing policy."""
        parts = [f"{policy}:{count}" for (policy, _), count in zip(runs, shape, strict=True)]
        changes = {"gradient_checkpointing": ",".join(parts) if len(runs) > 1 else policies[0]}
        if some:  # as with one such layer, and each of the others adds the same
            changes["keep_decoded"] = "1"
        return simulate(model.with_layers(sum(shape)), config.model_copy(update=changes))

    result = _deep(shallow, counts, few, max(2, period))
    return result.with_more("decoded base", decoded) if some else result


def _deep(
    shallow: Callable[[Sequence[int]], SimulatedStep],
    counts: Sequence[int],
    few: tuple[int, int],
    ends: int,
) -> SimulatedStep:
    """The step with `counts` layers of each checkpointing policy.

    In both directions the bytes grow or shrink by the same amount from layer to layer of a policy,
    or from period to period, so the ends decide: the first and last `ends` layers of each policy
    are looked at. A policy of many layers is simulated with the first of `few`, and once with the
    second.
    """
    low, high = few
    start = [low if count > high else count for count in counts]
    first = _named_by_end(shallow(start), start, ends)
    others = []
    for index, count in enumerate(counts):
        if count > high:
            shape = [*start[:index], high, *start[index + 1 :]]
            more = _named_by_end(shallow(shape), shape, ends)
            others.append(((count - low) / (high - low), more))
    return _extrapolated(first, others)


def _extrapolated(
    first: SimulatedStep, others: Sequence[tuple[float, SimulatedStep]]
) -> SimulatedStep:
    """`first` and, for each of `others`, its difference from `first` so many times."""
    rest = [other for _, other in others]

    def further(start: float, later: Sequence[float]) -> float:
        steps = zip(others, later, strict=True)
        return start + sum(times * (value - start) for (times, _), value in steps)

    def peak(start: Peak, later: Sequence[Peak]) -> Peak:
        owners = {
            owner: round(further(size, [other.owners[owner] for other in later]))
            for owner, size in start.owners.items()
        }
        return Peak(sum(owners.values()), owners)

    return SimulatedStep(
        load=peak(first.load, [other.load for other in rest]),
        segments={
            name: peak(segment, [other.segments[name] for other in rest])
            for name, segment in first.segments.items()
            if all(name in other.segments for other in rest)
        },
        resident={
            owner: max(0, round(further(size, [other.resident[owner] for other in rest])))
            for owner, size in first.resident.items()
        },
        trainable=round(further(first.trainable, [other.trainable for other in rest])),
        flops=further(first.flops, [other.flops for other in rest]),
        host=round(further(first.host, [other.host for other in rest])),
        passes={
            kind: round(further(given, [other.passes.get(kind, 0) for other in rest]))
            for kind, given in first.passes.items()
        },
        steps=first.steps,
    )


def _named_by_end(step: SimulatedStep, counts: Sequence[int], ends: int) -> SimulatedStep:
    """Segments named by their distance from the first layer of a policy, or, negative, its last.

    `counts` are the layers of each policy; those that lie `ends` layers or more from both of its
    ends are left out.
    """
    names = [
        (policy, index if index < ends else index - count)
        for policy, count in enumerate(counts)
        for index in range(count)
    ]
    segments = {}
    for (kind, layer), peak in step.segments.items():
        if kind not in ("forward", "backward", "between layers"):
            segments[kind, layer] = peak
        elif -ends <= (near := names[layer][1]) < ends:
            segments[f"{kind}, policy {names[layer][0]}", near] = peak
    return replace(step, segments=segments)
