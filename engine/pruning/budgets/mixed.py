"""Prune several parts of a model under one budget.

Each part (layers, experts, channels, heads) is pruned alone by a few of the counts that its shape
allows, repaired, and measured: how far the model strays from the whole one, in nats a token of
rows that nothing was fitted to. Between these counts the loss follows a line. Of all combinations
that fit the budget the one is taken whose losses add up to the least; of equal ones the largest
model. Then the parts are pruned one after the other, layers first, heads last, each chosen and
repaired on what is there by then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from engine.config.choices import Prunable
from engine.config.tasks.pruning import PruneSettings
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.device import resolve_device, resolve_dtype
from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_model
from engine.model_sources.pruning_record import read_pruning
from engine.pruning.budgets.costs import (
    Costs,
    Counts,
    Parts,
    milliseconds_of,
    milliseconds_on,
    parameters_of,
)
from engine.pruning.budgets.options import (
    counts_of,
    interpolated,
    joined,
    measured_options,
    options_of,
    units_of,
)
from engine.pruning.calibration import calibration_examples
from engine.pruning.cut import cut_source
from engine.pruning.reconstruction.from_settings import (
    calibration_of,
    repair_of,
    say_memory,
    scores_of,
)
from engine.pruning.reconstruction.repair import RepairedSource
from engine.pruning.reconstruction.sensitivity import set_aside
from engine.pruning.report import describe
from engine.pruning.scores import LayerScores, prunable_heads
from engine.pruning.selection import Rules, select
from engine.pruning.structures.prune_structures import elements, prune_structures
from kernels.loss.linear_cross_entropy import Head
from kernels.loss.linear_distillation import linear_distillation
from models.config.model_config import ModelConfig
from models.decoder import DISTILLATION_TOKENS, Decoder

Record = dict[str, Any]
_ORDER: tuple[Prunable, ...] = ("layers", "experts", "mlp", "kv-groups", "heads")


def prune_to_target(
    source: ModelSource, settings: PruneSettings, protected: frozenset[int]
) -> tuple[ModelSource, Record]:
    """The model inside the budget, and what its record says.

    Raises `ConfigError` where no combination of counts fits, and for a model with heads that an
    earlier pruning left in it as zeros.
    """
    earlier = read_pruning(source.path)
    if earlier is not None and earlier.heads:
        raise ConfigError(
            f"{source.path} has pruned heads in its weights, as zeros or behind a mask; --target "
            "counts what is there. Give the model that was pruned, or cut them out with --mode "
            "structural first."
        )
    assert settings.target is not None
    kind, _, share = settings.target.partition("=")
    work = _Work(source, settings, protected)
    losses = {part: work.losses(part) for part in _ORDER if part in settings.parts}
    costs = Costs(source.config, parameters_of if kind == "params" else work.timer())
    whole = costs.of(Counts())
    asked = float(share) * whole
    chosen, counts = _choice(work, losses, costs, asked)
    left, stages = source, []
    for part, count in chosen.items():
        if count:
            left, record = work.without(left, part, count)
            stages.append(record)
    sizes = {"before": elements(source), "after": elements(left)}
    budget = {"kind": kind, "before": whole, "asked": asked, "after": costs.of(counts)}
    if kind == "latency":
        budget["timed"] = {"before": work.milliseconds(source), "after": work.milliseconds(left)}
    told = {part: {str(n): loss for n, loss in one.items()} for part, one in losses.items()}
    return left, {
        "mode": "structural",
        "what": settings.what,
        "metric": settings.importance,
        "target": settings.target,
        "budget": budget,
        "counts": chosen,
        "losses": told,
        "stages": stages,
        "units": {
            "before": sum(units_of(source.config, part) for part in chosen),
            "asked": sum(chosen.values()),
            "removed": sum(chosen.values()),
        },
        "parameters": sizes,
        "protected": sorted(protected),
        "seed": settings.seed,
        "pruned_heads": {},
    }


class _Work:
    """Prunes one part of a model by some count, and measures how far what is left strays."""

    def __init__(
        self, source: ModelSource, settings: PruneSettings, protected: frozenset[int]
    ) -> None:
        self.source, self.settings, self._protected = source, settings, protected
        self.order: list[int] = []
        self._scored: dict[Prunable, list[LayerScores]] = {}
        examples = calibration_examples(source, calibration_of(settings))
        say_memory(source, examples, settings)
        measured, self._examples = set_aside(examples)
        self._batch = collate(measured)
        self._known, self._head = self._states(source)

    def losses(self, part: Prunable) -> dict[int, float]:
        """Nats a token at the counts of a part that are measured."""
        result = {}
        for count in measured_options(options_of(self.source.config, part)):
            left, record = self.without(self.source, part, count)
            if part == "layers":
                self.order = [one["layer"] for one in record["order"]]
            states, head = self._states(left)
            total = linear_distillation(
                states, head, self._known, self._head, 1.0, DISTILLATION_TOKENS
            )
            result[count] = float(total.double()) / max(len(states), 1)
        return result

    def without(
        self, source: ModelSource, part: Prunable, count: int
    ) -> tuple[ModelSource, Record]:
        """A model without so many units of a part, repaired as settings ask."""
        share = count / units_of(source.config, part)
        settings = self.settings.model_copy(
            update={"what": part, "fraction": share, "target": None, "mode": "structural"}
        )
        if settings.prunes_heads:
            return _without_heads(
                source, settings, self._scores(source, part, settings), self._rows
            )
        return prune_structures(source, settings, self._protected, self._examples)

    def _rows(self) -> list[Example]:
        return self._examples

    def _scores(
        self, source: ModelSource, part: Prunable, settings: PruneSettings
    ) -> list[LayerScores]:
        """Scores of heads, which no count of them decides: those of the whole model stay."""
        known = self._scored.get(part) if source is self.source else None
        if known is not None:
            return known
        heads = prunable_heads(source, settings.heads)
        scored = scores_of(source, heads, settings, self._rows)
        if source is self.source:
            self._scored[part] = scored
        return scored

    def timer(self) -> Callable[[ModelConfig], Parts]:
        """Measures milliseconds on the device of the settings."""
        device = resolve_device(self.settings.device)
        return milliseconds_on(device, resolve_dtype(self.settings.compute_dtype, device))

    def milliseconds(self, source: ModelSource) -> float:
        """The time of a pass through a whole model."""
        return milliseconds_of(self._built(source))

    def _built(self, source: ModelSource) -> Decoder:
        device = resolve_device(self.settings.device)
        return build_model(
            source,
            quantization=self.settings.quantize,
            device=device,
            dtype=resolve_dtype(self.settings.compute_dtype, device),
        )

    @torch.no_grad()
    def _states(self, source: ModelSource) -> tuple[Tensor, Head]:
        """What the head reads at the trained tokens (n, H), and the head."""
        model = self._built(source)
        batch = self._batch.to(model.device, model.ids_device)
        states = model.hidden_states(batch).index_select(0, batch.trained)
        return model.model.norm(states), model.head_weight()


def _without_heads(
    source: ModelSource,
    settings: PruneSettings,
    scored: list[LayerScores],
    rows: Callable[[], list[Example]],
) -> tuple[ModelSource, Record]:
    """As many heads, or key/value heads with what reads them, out of every layer."""
    rules = Rules(fraction=settings.share, granularity=settings.grouping, uniform=True)
    choice = select(scored, rules)
    record = describe(scored, rules, choice, settings.importance, settings.form)
    record["what"] = settings.what
    changed = source
    if settings.repairs:
        changes, record["repair"] = repair_of(source, scored, choice.heads, settings, rows)
        changed = RepairedSource(source, changes)
    return cut_source(changed, scored, choice, False)[0], record


def _choice(
    work: _Work, losses: Mapping[Prunable, Mapping[int, float]], costs: Costs, most: float
) -> tuple[dict[Prunable, int], Counts]:
    """The counts of every part that cost at most so much and lose least. Raises `ConfigError`."""
    config = work.source.config
    best: tuple[float, float, dict[Prunable, int], Counts] | None = None
    least = costs.of(Counts())
    fine: list[Prunable] = [part for part in losses if part == "mlp"]
    coarse: list[Prunable] = [part for part in losses if part != "mlp"]
    for given in product(*(options_of(config, part) for part in coarse)):
        taken: dict[Prunable, int] = dict(zip(coarse, given, strict=True))
        for last in _fits(work, taken, fine, costs, most):
            counts = {part: (taken | last)[part] for part in losses}
            together = joined(
                [counts_of(config, part, n, work.order) for part, n in counts.items()]
            )
            cost = costs.of(together)
            least = min(least, cost)
            loss = sum(interpolated(losses[part], n) for part, n in counts.items())
            if cost <= most and (best is None or (loss, -cost) < best[:2]):
                best = loss, -cost, counts, together
    if best is None:
        raise ConfigError(
            f"--target {work.settings.target}: without what --what {work.settings.what} lets go, "
            f"{least / costs.of(Counts()):.3f} of the whole is left at the least. Nothing was "
            "written. Ask for a larger share, or name more parts with --what."
        )
    return best[2], best[3]


def _fits(
    work: _Work,
    taken: Mapping[Prunable, int],
    fine: Sequence[Prunable],
    costs: Costs,
    most: float,
) -> list[dict[Prunable, int]]:
    """The fewest channels that fit beside what is taken, or the most there are; {} without any."""
    if not fine:
        return [{}]
    config = work.source.config
    options = options_of(config, "mlp")
    parts = [counts_of(config, part, n, work.order) for part, n in taken.items()]

    def cost(channels: int) -> float:
        return costs.of(joined([*parts, Counts(channels=channels)]))

    index = bisect_left(options, True, key=lambda channels: cost(channels) <= most)
    return [{"mlp": options[min(index, len(options) - 1)]}]
