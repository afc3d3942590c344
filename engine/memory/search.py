"""Find the fastest settings that fit a memory budget.

Combinations of memory options (`engine.memory.options`) are tried in a fixed order, that of the
time they are assumed to cost, and the first that fits is taken. A combination says what backward
recomputes, how many rows a micro-batch holds (with more micro-batches in exchange, so that a step
learns from as many rows), and which options are on. Where it recomputes more than a faster policy,
as many of the last layers as fit take the faster one. If nothing fits, rows are cut to the length
that does. The rank and what is trained are never changed. The settings that need the least are
planned first: a budget below them is refused at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.config.choices import POLICIES
from engine.config.rules import allows
from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError, gib
from engine.memory.decoded import resolve_decoded
from engine.memory.estimate import MemoryPlan
from engine.memory.options import (
    NAMES,
    MemoryOption,
    apply_options,
    combinations,
    memory_options,
)

CONTEXT_BUDGETS_GB = (6, 8, 12, 16, 24, 40, 48, 80, 141)
SHORTEST = 64
LEAST_LENGTH = 8

_ROUND = 64
_TABLE_SLACK = 1 / 128

Planner = Callable[[TrainConfig], MemoryPlan]
"""Plans a run of these settings on the model and machine in question."""


@dataclass(frozen=True)
class Choice:
    """A plan that fits, the settings it changed (name: before, after), and how many were tried."""

    plan: MemoryPlan
    changes: dict[str, tuple[object, object]]
    tried: int
    why: str


@dataclass(frozen=True)
class LongestRow:
    """The tokens of one row that fit a GPU of `gigabytes`, all weights there or streamed to it."""

    gigabytes: float
    resident: int | None
    streamed: int | None

    @property
    def tokens(self) -> int | None:
        """The most that fit either way."""
        return self.streamed if (self.streamed or 0) > (self.resident or 0) else self.resident


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    """The same configuration with other values."""
    return config.model_copy(update=changes)


def choose(config: TrainConfig, budget: int, planner: Planner) -> Choice:
    """The fastest settings whose plan is within `budget` bytes.

    Raises `MemoryPlanError` saying what is missing and the three cheapest ways out.
    """
    bare = changed(config, keep_decoded="none") if config.keep_decoded == "auto" else config
    search = _Search(bare, budget, planner)
    search.require_any()
    fitting = search.first_that_fits()
    why = "the fastest of the settings that fit"
    if fitting is None:
        length, least = max(
            (
                (longest(least, budget, search.plan, config.max_length) or 0, least)
                for least in search.leasts(search.options)
            ),
            key=lambda entry: entry[0],
        )
        assert length, "rows of 64 tokens fit"
        fitting = changed(least, max_length=length)
        why = f"nothing else fits at {config.max_length} tokens, so longer rows are cut"
    if config.keep_decoded == "auto":  # what the fastest settings leave free
        keep, _ = resolve_decoded(
            changed(fitting, keep_decoded="auto"), search.plan(fitting).layers, budget, search.plan
        )
        fitting = changed(fitting, keep_decoded=keep)
    return Choice(search.plan(fitting), _changes(config, fitting), len(search.planned), why)


class _Search:
    """The search for one run and budget; every plan is made once."""

    def __init__(self, config: TrainConfig, budget: int, planner: Planner) -> None:
        self.config, self.budget, self.planner = config, budget, planner
        self.planned: dict[str, MemoryPlan] = {}
        made = self.plan(least_step(config))  # which knows the machine and the model
        self.options = memory_options(config, made.gpu, made.tied)

    def plan(self, candidate: TrainConfig) -> MemoryPlan:
        key = candidate.model_dump_json()
        if key not in self.planned:
            self.planned[key] = self.planner(candidate)
        return self.planned[key]

    def fits(self, candidate: TrainConfig) -> bool:
        return self.plan(candidate).total <= self.budget

    def leasts(
        self, options: Sequence[MemoryOption], max_length: int | None = None
    ) -> list[TrainConfig]:
        """What may need the least: one row at a time, or one pass of all that steps in backward."""
        batches = [1]
        steps = any(option.setting == "optimizer_in_backward" for option in options)
        if self.config.batch_size > 1 and (steps or self.config.optimizer_in_backward):
            batches.append(self.config.batch_size)
        length = max_length or self.config.max_length
        shapes = [changed(self._shaped("full", batch), max_length=length) for batch in batches]
        return [apply_options(shape, options) for shape in shapes]

    def least(
        self, options: Sequence[MemoryOption] | None = None, max_length: int | None = None
    ) -> TrainConfig:
        """The settings that need the least, rows as long as asked for or as here."""
        choices = self.leasts(self.options if options is None else options, max_length)
        return choices[0] if len(choices) == 1 else min(choices, key=lambda c: self.plan(c).total)

    def require_any(self) -> None:
        """Raises `MemoryPlanError` where not even the least settings fit, with short rows."""
        shortest = self.least(max_length=min(SHORTEST, self.config.max_length))
        if not self.fits(shortest):
            raise MemoryPlanError(_refusal(self.config, shortest, self.budget, self.plan))

    def _shaped(self, policy: str, batch: int) -> TrainConfig:
        accumulate = self.config.batch_size * self.config.accumulate // batch
        return changed(
            self.config,
            gradient_checkpointing=policy,
            batch_size=batch,
            accumulate=accumulate,
            optimizer_in_backward=self.config.optimizer_in_backward and accumulate == 1,
        )

    def first_that_fits(self) -> TrainConfig | None:
        """The first combination that fits; None if none does.

        Streaming weights costs more than anything else saves, so it is the last resort.
        """
        streams = [option for option in self.options if option.value == "weights"]
        others = [option for option in self.options if option.value != "weights"]
        for always in ([], streams):
            if self.fits(self.least([*others, *always])):
                return self._with_faster_layers(self._first(always, others))
        return None

    def _first(self, always: list[MemoryOption], options: list[MemoryOption]) -> TrainConfig:
        """The first of `combinations` that fits, with the options in `always`."""
        hopeless: dict[tuple[str, int], bool] = {}
        for policy, batch, count in combinations(self.config, options):
            shaped, shape = self._shaped(policy, batch), (policy, batch)
            if shape not in hopeless:
                hopeless[shape] = not self.fits(apply_options(shaped, [*options, *always]))
            candidate = apply_options(shaped, [*options[:count], *always])
            if not hopeless[shape] and self.fits(candidate):
                return candidate
        raise AssertionError("the settings that need the least fit and are a combination")

    def _with_faster_layers(self, fitting: TrainConfig) -> TrainConfig:
        """Let the last layers save what the next faster policy saves, as many as fit.

        The last layers' activations are the first to go in backward, before gradients pile up.
        """
        slow = fitting.gradient_checkpointing
        layers = self.plan(fitting).layers
        if slow not in POLICIES[1:] or layers < 2:
            return fitting
        fast = POLICIES[POLICIES.index(slow) - 1]
        total = self.plan(fitting).total
        most = self.plan(changed(fitting, gradient_checkpointing=fast)).total
        per_layer = max(1.0, (most - total) / layers)
        count = min(layers - 1, int((self.budget - total) / per_layer))
        for faster in range(min(layers - 1, count + 2), max(0, count - 3), -1):
            spec = f"{slow}:{layers - faster},{fast}"
            if self.fits(changed(fitting, gradient_checkpointing=spec)):
                return changed(fitting, gradient_checkpointing=spec)
        return fitting


def least_step(config: TrainConfig) -> TrainConfig:
    """The run with its memory options, cut to one row as short as `max_length` may be."""
    return changed(
        config,
        max_length=LEAST_LENGTH,
        batch_size=1,
        accumulate=1,
        gradient_checkpointing="full",
    )


def require_any(config: TrainConfig, budget: int, plan: Planner) -> None:
    """Raise `MemoryPlanError` where no settings fit: what is missing, and three ways out."""
    _Search(config, budget, plan).require_any()


def smallest(config: TrainConfig, plan: Planner) -> TrainConfig:
    """The settings that need the least memory and learn the same."""
    return _Search(config, 0, plan).least()


def _changes(config: TrainConfig, other: TrainConfig) -> dict[str, tuple[object, object]]:
    return {
        name: (getattr(config, name), getattr(other, name))
        for name in NAMES
        if getattr(config, name) != getattr(other, name)
        and not (name == "keep_decoded" and other.keep_decoded == "none")
    }


def longest(
    config: TrainConfig,
    budget: int,
    plan: Planner,
    most: int,
    slack: float = 0.0,
    known: int | None = None,
) -> int | None:
    """The most tokens of a row that fit, up to `most`; None if not even 64 do.

    It is one of `row_lengths`, which do not depend on the budget: a larger budget never holds less.
    `known` is such a length that fits.
    """

    def total(tokens: int) -> int:
        return plan(changed(config, max_length=tokens)).total

    lengths = row_lengths(most, slack)
    low, high = lengths.index(known) if known else 0, len(lengths) - 1
    low_total = total(lengths[low])
    if low_total > budget:
        return None
    high_total = total(lengths[high])
    if high_total <= budget:
        return lengths[high]
    while high - low > 1:
        # Bytes grow nearly in proportion to tokens: aim there, then look beside it.
        share = (budget - low_total) / max(1, high_total - low_total)
        aimed = lengths[low] + share * (lengths[high] - lengths[low])
        tried = min(max(bisect_right(lengths, aimed) - 1, low + 1), high - 1)
        for _ in range(2):
            needed = total(lengths[tried])
            if needed <= budget:
                low, low_total, beside = tried, needed, tried + 1
            else:
                high, high_total, beside = tried, needed, tried - 1
            if not low < beside < high:
                break
            tried = beside
    return lengths[low]


def row_lengths(most: int, slack: float) -> list[int]:
    """Multiples of 64 up to `most`, which ends them, no two of them closer than a share `slack`."""
    lengths = [SHORTEST]
    while lengths[-1] < most:
        wider = int(lengths[-1] * (1.0 + slack)) // _ROUND * _ROUND
        lengths.append(min(most, max(lengths[-1] + _ROUND, wider)))
    return lengths


def _refusal(config: TrainConfig, shortest: TrainConfig, budget: int, plan: Planner) -> str:
    """One paragraph: what is missing by how much, and the three cheapest ways out.

    `shortest` are the settings that need the least.
    """
    needed = plan(shortest)
    largest = sorted(needed.step.owners.items(), key=lambda entry: -entry[1])[:3]
    most = ", ".join(f"{owner} {gib(size)}" for owner, size in largest)
    exits = []
    for text, changes in _sacrifices(config):
        need = plan(changed(shortest, **changes)).total
        verdict = "fits" if need <= budget else f"needs {gib(need)}"
        exits.append((need > budget, need, f"{text} ({verdict})"))
    exits.append((False, needed.total, f"--memory-budget {_mib(needed.total)}MiB"))
    exits.sort(key=lambda entry: entry[:2])
    cheapest = "; ".join(text for _, _, text in exits[:3])
    return (
        f"No settings fit a memory budget of {gib(budget)}: rows of {shortest.max_length} tokens, "
        f"one at a time with full recomputation and all that saves memory, still need "
        f"{gib(needed.total)}, which is {gib(needed.total - budget)} too much ({most}). "
        f"Ways out: {cheapest}."
    )


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _sacrifices(config: TrainConfig) -> Iterator[tuple[str, dict[str, object]]]:
    """What else could be given up, with the words for it."""
    if config.method != "qlora":
        yield "--method qlora", {"method": "qlora"}
    if config.dtype == "float32":
        yield "--dtype bfloat16", {"dtype": "bfloat16"}
    if not config.double_quant:
        yield "--double-quant", {"double_quant": True}
    if config.every_weight:
        if not (config.optimizer_in_backward or allows(config, optimizer_in_backward=True)):
            text = "--optimizer-in-backward --max-grad-norm 0 --accumulate 1"
            row = " --batch-size 1" if config.batch_size > 1 else ""
            yield (
                text + row,
                {
                    "optimizer_in_backward": True,
                    "max_grad_norm": 0.0,
                    "accumulate": 1,
                    "batch_size": 1,
                },
            )
    elif config.target_modules != "qv":
        yield "--target-modules qv", {"target_modules": "qv"}
    if not config.every_weight and config.lora_rank > 4:
        yield "--lora-rank 4", {"lora_rank": 4}
    if config.optimizer in ("adamw", "muon"):
        yield "--optimizer adamw8bit", {"optimizer": "adamw8bit"}


def context_table(
    config: TrainConfig,
    plan: Planner,
    limit: int,
    sizes: Sequence[float] = CONTEXT_BUDGETS_GB,
) -> list[LongestRow]:
    """The longest row with full recomputation for GPUs of `sizes` GB, all memory options on.

    Lengths are within a percent of the most, and never shorter on a larger GPU.
    """
    search = _Search(changed(config, accumulate=1, batch_size=1), 0, plan)
    least = search.least()
    resident = changed(least, offload=tuple(kind for kind in least.offload if kind != "weights"))
    tokens: int | None = None
    more: int | None = None
    table = []
    for size in sorted(sizes):
        budget = int(size * 10**9)
        tokens = longest(resident, budget, search.plan, limit, _TABLE_SLACK, tokens)
        if least.offload == resident.offload or tokens == limit:
            more = tokens
        else:
            more = longest(least, budget, search.plan, limit, _TABLE_SLACK, more or tokens)
        table.append(LongestRow(size, tokens, more))
    return table
