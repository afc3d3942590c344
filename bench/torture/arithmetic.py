"""Cut steps, and values that are not finite, change nothing.

The model, the rows and the places of faults are those of the test of every commit; here are more.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.torture.campaign import Campaign, Figures, silent
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import CheckpointError
from engine.runs import checkpoints
from engine.runs.checkpoints import CheckpointStore
from engine.training.step import TrainingStep
from optim import Adafactor, AdamW8bit, Lion8bit
from tests.engine.training.test_step_algebra import SITES, build, cuts, measured, poison, ragged

MOST_MICRO_BATCHES = 16
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
VALUES = (float("nan"), float("inf"), float("-inf"))
HUGE = 1e30
"""Finite, with a square that is not, in fp32."""

MOST_STEPS = 6
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": AdamW8bit,
    "Adafactor": Adafactor,
    "Lion": Lion8bit,
}


def cut_steps(trials: int, seed: int) -> Figures:
    """A step of ragged rows, packed or cut into 1 to 16 micro-batches: its loss and gradient.

    Of each trial's rows one is then changed: what the others' documents compute must stay, bit by
    bit.
    """
    chance, counts = random.Random(seed), Counter[str]()
    worst = dict.fromkeys(BOUNDS, 0.0)
    for number in range(trials):
        dtype = (torch.float64, torch.float32)[number % 2]
        rows = ragged(chance.randrange(1 << 30))
        loss, gradient = measured([collate(rows)], dtype)
        parts = 1 + number // 2 % MOST_MICRO_BATCHES  # each number with both types
        apart = [collate(part) for part in cuts(rows, parts, chance)]
        other, cut = measured(apart, dtype)
        off = max(abs(other - loss) / abs(loss), float((cut - gradient).norm() / gradient.norm()))
        worst[dtype] = max(worst[dtype], off)
        counts["equal"] += off <= BOUNDS[dtype]
        counts["isolated"] += _isolated(rows, chance.randrange(len(rows)), dtype)
    told = {f"worst_{str(dtype)[6:]}": float(f"{off:.1e}") for dtype, off in worst.items()}
    return {"trials": trials, **counts, **told}


def _isolated(rows: list[Example], changed: int, dtype: torch.dtype) -> bool:
    """Whether another document's tokens change nothing but that document's logits."""
    model, batch = build(dtype), collate(rows)
    row = rows[changed]
    other = Example((row.ids + 1) % 60, row.mask, row.source)
    others = [*rows[:changed], other, *rows[changed + 1 :]]
    with torch.no_grad():
        before, after = (
            model(one.input_ids[None], one.cu_seqlens)[0] for one in (batch, collate(others))
        )
    start = sum(len(one) for one in rows[:changed])
    inside = torch.zeros(len(before), dtype=torch.bool)
    inside[start : start + len(row)] = True
    same = (before == after).all(dim=1)
    return bool(same[~inside].all()) and not bool(same[inside].all())


def not_finite(trials: int, seed: int) -> Figures:
    """NaN, infinity or a huge gradient somewhere at some step of a run, or in a checkpoint.

    A step that meets one must say so, and a checkpoint with one must not load; the weights stay as
    they were, bit by bit.
    """
    chance, counts = random.Random(seed), Counter[str]()
    sites = [("gradient", HUGE)]
    everywhere = ("checkpoint", *(f"moment of {name}" for name in OPTIMIZERS), *SITES)
    sites += [(site, value) for value in VALUES for site in everywhere]
    with silent():
        for number in range(trials):
            site, value = sites[number % len(sites)]
            if site == "checkpoint":
                counts[_poisoned_checkpoint(value, chance)] += 1
            else:
                counts[_poisoned_step(site, value, chance)] += 1
    return {"trials": trials, "sites": len({site for site, _ in sites}), **counts}


def _poisoned_step(site: str, value: float, chance: random.Random) -> str:
    """`stopped`, or what is wrong, of a run that meets a value after some steps."""
    model = build(torch.float32)
    kind = OPTIMIZERS.get(site.rpartition(" ")[2]) or chance.choice([*OPTIMIZERS.values()])
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    clip = chance.choice((0.0, 1.0)) if value != HUGE else 0.0
    step = TrainingStep(model, optimizer, max_grad_norm=clip)
    rows = ragged(chance.randrange(1 << 30))
    batches, steps = [collate(rows[:2]), collate(rows[2:4])], chance.randrange(1, MOST_STEPS)
    if any(step(batches, number).skipped for number in range(steps)):
        return "skipped without a reason"
    in_moment = site.startswith("moment")
    if in_moment:
        state = optimizer.state_tensors()
        chance.choice([t for t in state.values() if t.is_floating_point()]).view(-1)[0] = value
    else:
        poison(model, site, value)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A step does not wait for its moments: they are looked at on the device.
    if not (step(batches, steps).skipped or in_moment):
        return "trained on"
    same = all(
        torch.equal(p.nan_to_num(7), before[name].nan_to_num(7))
        for name, p in model.named_parameters()
    )
    return "stopped" if same and optimizer.skipped_steps == 1 else "moved"


def _poisoned_checkpoint(value: float, chance: random.Random) -> str:
    """Whether a checkpoint with a value that is not finite, written all the same, is refused."""
    with tempfile.TemporaryDirectory() as name, _Unchecked(Path(name)) as store:
        tensors = {"a": torch.randn(9, 5), "b": torch.randn(300)}
        chance.choice([*tensors.values()]).view(-1)[chance.randrange(45)] = value
        store.save(1, {"adapter/adapter_model": tensors}, {"step": 1})
        try:
            store.load(store.path_of(1)).tensors("adapter/adapter_model")
        except CheckpointError:
            return "stopped"
        return "loaded"


class _Unchecked(CheckpointStore):
    """Saves whatever it gets."""

    def save(self, *given: Any, **named: Any) -> Path:
        check, checkpoints.refuse_nonfinite = checkpoints.refuse_nonfinite, lambda *_: None
        try:
            return super().save(*given, **named)
        finally:
            checkpoints.refuse_nonfinite = check


ARITHMETIC = {
    "T18": Campaign(
        "steps cut into micro-batches, packed and not",
        400,
        cut_steps,
        lambda f: f.get("equal") == f.get("isolated") == f["trials"],
        part=100,
    ),
    "T19": Campaign(
        "values that are not finite in weights, gradients, moments and checkpoints",
        1_000,
        not_finite,
        lambda f: f.get("stopped") == f["trials"],
        part=250,
    ),
}
