"""Settings that fit a memory budget, the fastest first, and what a budget could hold.

Candidates are what costs time and nothing else: how much backward recomputes, how many rows a
micro-batch holds (with more micro-batches in their place, so that a step learns from as many rows),
and how many rows of logits exist at once. They are tried in the order of their time, which is the
operations of the dry pass with a surcharge for smaller pieces; the first that fits is taken. If
none does, rows are cut to the length that fits. The rank and what is trained are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.config import TrainConfig
from engine.errors import MemoryPlanError
from engine.memory import gib
from engine.plan import MemoryPlan

LEVELS = ("none", "selective", "full")
CONTEXT_BUDGETS_GB = (6, 8, 12, 16, 24, 40, 48, 80, 141)
SHORTEST = 64

_HALVED_BATCH, _HALVED_CHUNK = 0.03, 0.01
"""Assumed cost of halving a micro-batch or a chunk of the loss, as a share of the step's time."""

_ROUND = 64

Planner = Callable[[TrainConfig], MemoryPlan]
"""Plans a run of these settings on the model and machine in question."""


@dataclass(frozen=True)
class Choice:
    """A plan that fits, the settings it changed (name: before, after), and how many were tried."""

    plan: MemoryPlan
    changes: dict[str, tuple[object, object]]
    tried: int
    why: str


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    """The same configuration with other values."""
    return config.model_copy(update=changes)


def choose(config: TrainConfig, budget: int, planner: Planner) -> Choice:
    """The fastest settings whose plan is within `budget` bytes.

    Raises `MemoryPlanError` saying what is missing and the three cheapest ways out.
    """
    planned: dict[TrainConfig, MemoryPlan] = {}

    def plan(candidate: TrainConfig) -> MemoryPlan:
        if candidate not in planned:
            planned[candidate] = planner(candidate)
        return planned[candidate]

    least = _smallest(config)
    if plan(least).total > budget:
        return _shorter(config, least, budget, plan, len(planned))
    hopeless = {
        level
        for level in LEVELS
        if plan(changed(least, gradient_checkpointing=level)).total > budget
    }
    for candidate in _by_time(config, plan):
        if candidate.gradient_checkpointing in hopeless:
            continue
        if plan(candidate).total <= budget:
            return Choice(
                plan(candidate),
                _changes(config, candidate),
                len(planned),
                "the fastest of the settings that fit",
            )
    raise AssertionError("the smallest settings fit and are among the candidates")


def _smallest(config: TrainConfig) -> TrainConfig:
    return changed(
        config,
        gradient_checkpointing="full",
        batch_size=1,
        accumulate=config.accumulate * config.batch_size,
        loss_chunk_rows=min(64, config.loss_chunk_rows),
    )


def _by_time(config: TrainConfig, plan: Planner) -> Iterator[TrainConfig]:
    """Every candidate, the fastest first; the operations of a level are planned once."""
    rows = config.batch_size * config.accumulate
    batches = sorted({b for b in range(1, config.batch_size + 1) if rows % b == 0}, reverse=True)
    chunks = [c for c in (config.loss_chunk_rows, 64) if c <= config.loss_chunk_rows]
    timed: list[tuple[float, int, TrainConfig]] = []
    for level in LEVELS:
        smallest = changed(_smallest(config), gradient_checkpointing=level)
        flops = plan(smallest).flops
        for batch in batches:
            for chunk in dict.fromkeys(chunks):
                surcharge = _HALVED_BATCH * _halvings(config.batch_size, batch)
                surcharge += _HALVED_CHUNK * _halvings(config.loss_chunk_rows, chunk)
                candidate = changed(
                    config,
                    gradient_checkpointing=level,
                    batch_size=batch,
                    accumulate=rows // batch,
                    loss_chunk_rows=chunk,
                )
                timed.append((flops * (1.0 + surcharge), len(timed), candidate))
    return iter(candidate for _, _, candidate in sorted(timed, key=lambda entry: entry[:2]))


def _halvings(before: int, after: int) -> float:
    return max(0, (before // after).bit_length() - 1)


def _changes(config: TrainConfig, other: TrainConfig) -> dict[str, tuple[object, object]]:
    names = ("gradient_checkpointing", "batch_size", "accumulate", "loss_chunk_rows", "max_length")
    return {
        name: (getattr(config, name), getattr(other, name))
        for name in names
        if getattr(config, name) != getattr(other, name)
    }


def _shorter(
    config: TrainConfig, least: TrainConfig, budget: int, plan: Planner, tried: int
) -> Choice:
    length = longest(least, budget, plan, config.max_length)
    if length is None:
        raise MemoryPlanError(refusal(config, budget, plan))
    candidate = changed(least, max_length=length)
    return Choice(
        plan(candidate),
        _changes(config, candidate),
        tried,
        f"nothing else fits at {config.max_length} tokens, so longer rows are cut",
    )


def longest(config: TrainConfig, budget: int, plan: Planner, most: int) -> int | None:
    """The most tokens of a row that fit, in steps of 64, up to `most`; None if not even 64 do."""

    def total(tokens: int) -> int:
        return plan(changed(config, max_length=tokens)).total

    low, high = SHORTEST, max(SHORTEST, most)
    low_total = total(low)
    if low_total > budget:
        return None
    if total(high) <= budget:
        return high
    high_total = total(high)
    while high - low > _ROUND:
        # Bytes grow nearly in proportion to tokens: aim there, and halve where that is no progress.
        share = (budget - low_total) / max(1, high_total - low_total)
        aimed = low + int((high - low) * share)
        middle = min(max(aimed, low + 1), high - 1) // _ROUND * _ROUND
        if middle in (low, high) or middle < low + _ROUND:
            middle = low + _ROUND
        found = total(middle)
        if found <= budget:
            if total(middle + _ROUND) > budget:
                return middle
            low, low_total = middle + _ROUND, total(middle + _ROUND)
        else:
            high, high_total = middle, found
    return low


def refusal(config: TrainConfig, budget: int, plan: Planner) -> str:
    """One paragraph: what is missing by how much, and the three cheapest ways out."""
    least = _smallest(config)
    shortest = changed(least, max_length=min(SHORTEST, config.max_length))
    smallest = plan(shortest)
    held = sorted(smallest.step.owners.items(), key=lambda entry: -entry[1])[:3]
    most = ", ".join(f"{owner} {gib(size)}" for owner, size in held)
    exits = []
    for text, changes in _ways(config):
        need = plan(changed(shortest, **changes)).total
        verdict = "fits" if need <= budget else f"needs {gib(need)}"
        exits.append((need > budget, need, f"{text} ({verdict})"))
    exits.append((False, smallest.total, f"--memory-budget {_mib(smallest.total)}MiB"))
    exits.sort(key=lambda entry: entry[:2])
    ways = "; ".join(text for _, _, text in exits[:3])
    return (
        f"No settings fit a memory budget of {gib(budget)}: rows of {shortest.max_length} tokens, "
        f"one at a time with full recomputation, still need {gib(smallest.total)}, which is "
        f"{gib(smallest.total - budget)} too much ({most}). Ways out: {ways}."
    )


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _ways(config: TrainConfig) -> Iterator[tuple[str, dict[str, object]]]:
    """What else could be given up, with the words for it."""
    if config.method != "qlora":
        yield "--method qlora", {"method": "qlora"}
    if config.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    if not config.double_quant:
        yield "--double-quant", {"double_quant": True}
    if config.target_modules != "qv":
        yield "--target-modules qv", {"target_modules": "qv"}
    if config.lora_rank > 4:
        yield "--lora-rank 4", {"lora_rank": 4}
    if config.optimizer != "adamw8bit":
        yield "--optimizer adamw8bit", {"optimizer": "adamw8bit"}


def context_table(config: TrainConfig, plan: Planner, limit: int) -> list[tuple[int, int | None]]:
    """(GB, tokens of one row that fit with full recomputation) for the usual cards' sizes."""
    least = changed(_smallest(config), accumulate=1)
    return [(size, longest(least, size * 10**9, plan, limit)) for size in CONTEXT_BUDGETS_GB]
