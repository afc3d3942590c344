"""Settings that fit a memory budget, the fastest first, and what a budget could hold.

Candidates are what costs time and nothing else: how much backward recomputes, how many rows a
micro-batch holds (with more micro-batches in their place, so that a step learns from as many rows),
and how far down the ladder of `engine.memory.options` the run goes. Their time is the operations of
the simulated step with surcharges for the rest; of those that fit the fastest is taken. Where that
recomputes more than a faster level, as many of the last layers as fit take the faster one. If
nothing fits, rows are cut to the length that does. The rank and what is trained are never changed.
The settings that need the least are planned first: a budget below them is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.config.choices import POLICIES
from engine.config.rules import allows
from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError
from engine.memory.estimate import MemoryPlan
from engine.memory.options import NAMES, MemoryOption, cost, memory_options, pull
from engine.memory.simulate.meter import gib

CONTEXT_BUDGETS_GB = (6, 8, 12, 16, 24, 40, 48, 80, 141)
SHORTEST = 64
LEAST_LENGTH = 8

_HALVED_BATCH = 0.03
"""Assumed cost of halving a micro-batch, as a share of the step's time."""

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
    """The tokens of one row that fit a GPU of `gigabytes`, and the settings that hold them."""

    gigabytes: int
    tokens: int | None
    streamed: bool


def changed(config: TrainConfig, **changes: object) -> TrainConfig:
    """The same configuration with other values."""
    return config.model_copy(update=changes)


def choose(config: TrainConfig, budget: int, planner: Planner) -> Choice:
    """The fastest settings whose plan is within `budget` bytes.

    Raises `MemoryPlanError` saying what is missing and the three cheapest ways out.
    """
    search = _Search(config, budget, planner)
    search.require_any()
    found = search.fastest()
    why = "the fastest of the settings that fit"
    if found is None:
        lengths = [
            (longest(least, budget, search.plan, config.max_length) or 0, least)
            for least in search.leasts()
        ]
        length, least = max(lengths, key=lambda found: found[0])
        assert length, "rows of 64 tokens were found to fit"
        found = changed(least, max_length=length)
        why = f"nothing else fits at {config.max_length} tokens, so longer rows are cut"
    return Choice(search.plan(found), _changes(config, found), len(search.planned), why)


class _Search:
    """The search for one run and budget; every plan is made once."""

    def __init__(self, config: TrainConfig, budget: int, planner: Planner) -> None:
        self.config, self.budget, self.planner = config, budget, planner
        self.planned: dict[str, MemoryPlan] = {}
        self.rungs = options_of(config, self.plan)

    def plan(self, candidate: TrainConfig) -> MemoryPlan:
        key = candidate.model_dump_json()
        if key not in self.planned:
            self.planned[key] = self.planner(candidate)
        return self.planned[key]

    def fits(self, candidate: TrainConfig) -> bool:
        return self.plan(candidate).total <= self.budget

    def least(self, max_length: int | None = None) -> TrainConfig:
        """The settings that need the least, rows as long as asked for or as here."""
        return self._smallest("full", max_length)

    def leasts(self, policy: str = "full", max_length: int | None = None) -> list[TrainConfig]:
        """Of a level what may need the least: one row at a time, or one pass of all that steps."""
        batches = [1]
        steps = any(rung.setting == "optimizer_in_backward" for rung in self.rungs)
        if self.config.batch_size > 1 and (steps or self.config.optimizer_in_backward):
            batches.append(self.config.batch_size)
        length = max_length or self.config.max_length
        shapes = [changed(self._shaped(policy, batch), max_length=length) for batch in batches]
        return [pull(shape, self.rungs) for shape in shapes]

    def _smallest(self, policy: str, max_length: int | None = None) -> TrainConfig:
        found = self.leasts(policy, max_length)
        return found[0] if len(found) == 1 else min(found, key=lambda c: self.plan(c).total)

    def require_any(self) -> None:
        """Raises `MemoryPlanError` where not even the least settings fit, with short rows."""
        shortest = self.least(min(SHORTEST, self.config.max_length))
        if not self.fits(shortest):
            raise MemoryPlanError(_refusal(self.config, shortest, self.budget, self.plan))

    def _shaped(self, policy: str, batch: int) -> TrainConfig:
        accumulate = self.config.batch_size * self.config.accumulate // batch
        shaped = changed(
            self.config, gradient_checkpointing=policy, batch_size=batch, accumulate=accumulate
        )
        stepping = allows(shaped, optimizer_in_backward=True)
        return changed(shaped, optimizer_in_backward=self.config.optimizer_in_backward and stepping)

    def fastest(self) -> TrainConfig | None:
        """The settings that fit and take the least time; None if none fit.

        Streaming weights costs more than any recompute saves, so it is looked at last.
        """
        every = self.rungs
        for self.rungs in ([rung for rung in every if rung.value != "weights"], every):
            if self.fits(self.least()):
                return self._fastest()
        return None

    def _fastest(self) -> TrainConfig:
        best: tuple[float, TrainConfig, list[MemoryOption]] | None = None
        for least_time, policy, batch in sorted(self._groups()):
            if best is not None and best[0] <= least_time:
                break
            shaped = self._shaped(policy, batch)
            count = self._rungs_needed(shaped)
            if count is None:
                continue
            options = self._needed(shaped, self.rungs[:count])
            time = least_time * (1.0 + cost(options))
            if best is None or time < best[0]:
                best = (time, shaped, options)
        assert best is not None, "the settings that need the least fit and are in a group"
        return self._faster_layers(pull(best[1], best[2]))

    def _groups(self) -> Iterator[tuple[float, str, int]]:
        """(time without memory options, level, rows of a micro-batch) of what may fit."""
        size = self.config.batch_size
        rows = size * self.config.accumulate
        batches = [b for b in range(1, size + 1) if rows % b == 0]
        for policy in POLICIES:
            smallest = self._smallest(policy)
            if not self.fits(smallest):
                continue
            for batch in batches:
                halvings = max(0, (size // batch).bit_length() - 1)
                yield self.plan(smallest).flops * (1 + _HALVED_BATCH * halvings), policy, batch

    def _rungs_needed(self, shaped: TrainConfig) -> int | None:
        """How far down the ladder the settings must go to fit; None if its end does not do."""
        if self.fits(shaped):
            return 0
        low, high = 0, len(self.rungs)
        if not self.fits(pull(shaped, self.rungs)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.fits(pull(shaped, self.rungs[:middle])):
                high = middle
            else:
                low = middle
        return high

    def _needed(self, shaped: TrainConfig, options: list[MemoryOption]) -> list[MemoryOption]:
        """The memory options without those that are not needed, the dearest tried first.

        The last is needed: without it the settings did not fit.
        """
        needed = list(options)
        for option in sorted(options[:-1], key=lambda option: -option.cost):
            rest = [other for other in needed if other is not option]
            if self.fits(pull(shaped, rest)):
                needed = rest
        return needed

    def _faster_layers(self, found: TrainConfig) -> TrainConfig:
        """Let the last layers keep what the next faster level keeps, as many as fit.

        The last layers' activations are the first to go in backward, before gradients pile up.
        """
        slow = found.gradient_checkpointing
        layers = self.plan(found).layers
        if slow not in POLICIES[1:] or layers < 2:
            return found
        fast = POLICIES[POLICIES.index(slow) - 1]
        most = self.plan(changed(found, gradient_checkpointing=fast)).total
        room = self.budget - self.plan(found).total
        per_layer = max(1.0, (most - self.plan(found).total) / layers)
        count = min(layers - 1, int(room / per_layer))
        for faster in range(min(layers - 1, count + 2), max(0, count - 3), -1):
            spec = f"{slow}:{layers - faster},{fast}"
            if self.fits(changed(found, gradient_checkpointing=spec)):
                return changed(found, gradient_checkpointing=spec)
        return found


def options_of(config: TrainConfig, plan: Planner) -> list[MemoryOption]:
    """The ladder of this run; a plan of its least step knows the machine and the model."""
    made = plan(least_step(config))
    return memory_options(config, made.gpu, made.tied)


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
    }


def longest(
    config: TrainConfig, budget: int, plan: Planner, most: int, slack: float = 0.0
) -> int | None:
    """The most tokens of a row that fit, up to `most`; None if not even 64 do.

    It is a multiple of 64, and the longest one but for a share `slack` of its tokens.
    """

    def total(tokens: int) -> int:
        return plan(changed(config, max_length=tokens)).total

    low, high = SHORTEST, max(SHORTEST, most)
    low_total = total(low)
    if low_total > budget:
        return None
    if total(high) <= budget:
        return high
    high_total = total(high)
    step = _ROUND
    while high - low > step:
        # Bytes grow nearly in proportion to tokens: aim there, and halve where that is no progress.
        share = (budget - low_total) / max(1, high_total - low_total)
        aimed = low + int((high - low) * share)
        step = max(_ROUND, int(aimed * slack) // _ROUND * _ROUND)
        middle = min(max(aimed, low + 1), high - 1) // _ROUND * _ROUND
        if middle in (low, high) or middle < low + _ROUND:
            middle = low + _ROUND
        found = total(middle)
        if found > budget:
            high, high_total = middle, found
            continue
        low, low_total = middle, found
        if low + step < high:
            beyond = total(low + step)
            if beyond > budget:
                return low
            low, low_total = low + step, beyond
    return low


def _refusal(config: TrainConfig, shortest: TrainConfig, budget: int, plan: Planner) -> str:
    """One paragraph: what is missing by how much, and the three cheapest ways out.

    `shortest` are the settings that need the least.
    """
    needed = plan(shortest)
    held = sorted(needed.step.owners.items(), key=lambda entry: -entry[1])[:3]
    most = ", ".join(f"{owner} {gib(size)}" for owner, size in held)
    exits = []
    for text, changes in _ways(config):
        need = plan(changed(shortest, **changes)).total
        verdict = "fits" if need <= budget else f"needs {gib(need)}"
        exits.append((need > budget, need, f"{text} ({verdict})"))
    exits.append((False, needed.total, f"--memory-budget {_mib(needed.total)}MiB"))
    exits.sort(key=lambda entry: entry[:2])
    ways = "; ".join(text for _, _, text in exits[:3])
    return (
        f"No settings fit a memory budget of {gib(budget)}: rows of {shortest.max_length} tokens, "
        f"one at a time with full recomputation and all that saves memory, still need "
        f"{gib(needed.total)}, which is {gib(needed.total - budget)} too much ({most}). "
        f"Ways out: {ways}."
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
    if config.method == "full":
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
    if config.method != "full" and config.lora_rank > 4:
        yield "--lora-rank 4", {"lora_rank": 4}
    if config.optimizer != "adamw8bit":
        yield "--optimizer adamw8bit", {"optimizer": "adamw8bit"}


def context_table(config: TrainConfig, plan: Planner, limit: int) -> list[LongestRow]:
    """The longest row with full recomputation for the usual GPUs' sizes, all memory options pulled.

    Weights are streamed only where nothing fits without. Lengths are within a percent of the most.
    """
    search = _Search(changed(config, accumulate=1, batch_size=1), 0, plan)
    least = search.least()
    resident = changed(least, offload=tuple(kind for kind in least.offload if kind != "weights"))
    table = []
    for size in CONTEXT_BUDGETS_GB:
        tokens = longest(resident, size * 10**9, search.plan, limit, _TABLE_SLACK)
        streamed = tokens is None and least.offload != resident.offload
        if streamed:
            tokens = longest(least, size * 10**9, search.plan, limit, _TABLE_SLACK)
        table.append(LongestRow(size, tokens, streamed and tokens is not None))
    return table
