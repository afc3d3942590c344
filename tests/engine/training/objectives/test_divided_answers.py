"""Preferences of full fine-tuning that ranks divide: steps and figures of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.data.batches.sequences import AnswerSet
from engine.training.objectives.evaluation import evaluate_answers
from engine.training.objectives.judged import JudgedObjective
from engine.training.objectives.objective import Objective
from engine.training.objectives.pairs import PairObjective
from engine.training.objectives.reference import reference_log_probs, stored_or_made
from engine.training.step import StepResult
from kernels.runtime.ranks import Ranks, host_sums
from models.layers.context import DEFAULT_SETTINGS
from models.layers.packed_batch import PackedBatch
from tests.engine.distributed.test_divided_training import Trained, assert_alike, settings, wide
from tests.engine.training.objectives.test_split_answers import LENGTHS, make
from tests.support.processes.rank_threads import run_ranks

STEPS = ((0, 1, 2), (1,), (2, 0))


class Learnt:
    """What a rank has after some steps of an objective."""

    def __init__(self, ranks: Ranks, kind: str, family: str) -> None:
        given, answers = make(kind)
        one = Trained(ranks, settings("adamw"), torch.float64, family)
        what = one.model, answers, range(len(LENGTHS)), DEFAULT_SETTINGS
        self.reference = reference_log_probs(*what, kind == "kto", ranks, tokens_per_batch=40)
        objective = measured(given, self.reference)
        step = replace(one.step, objective=objective)
        self.steps = [
            step(batches(answers, rows, ranks), number) for number, rows in enumerate(STEPS)
        ]
        self.heldout = evaluate_answers(one.model, objective, answers, ranks=ranks)
        self.weights = one.weights()

    @property
    def told(self) -> tuple[list[StepResult], dict[str, Tensor]]:
        return self.steps, self.weights


def measured(objective: Objective, reference: Tensor) -> Objective:
    """The objective against what was measured, where it has a reference."""
    if isinstance(objective, JudgedObjective):
        return replace(objective, reference=reference)
    assert isinstance(objective, PairObjective)
    return objective if objective.reference is None else replace(objective, reference=reference)


def batches(answers: AnswerSet, rows: tuple[int, ...], ranks: Ranks) -> list[PackedBatch]:
    """A rank's micro-batches of a step's rows, as many as every other's."""
    own = rows[ranks.rank :: ranks.size]
    return [answers.batch(own) if own else PackedBatch.idle()]


@pytest.mark.parametrize(
    ("kind", "family", "size"),
    [("dpo", "llama", 2), ("kto", "llama", 4), ("orpo", "qwen3_moe", 2), ("dpo", "qwen3", 4)],
)
def test_preferences_are_learnt_in_parts_as_by_one(
    kind: str, family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimizer_over", "piece_optimizer"):
        monkeypatch.setattr(f"engine.training.processes.together.{name}", wide)
    (alone,) = run_ranks(1, lambda ranks: Learnt(ranks, kind, family))
    for one in run_ranks(size, lambda ranks: Learnt(ranks, kind, family)):
        assert_alike(one.told, alone.told, 1e-12)
        torch.testing.assert_close(one.reference, alone.reference, rtol=1e-12, atol=0)
        for mine, other in zip(one.steps, alone.steps, strict=True):
            assert beyond_rounding(mine.figures) == pytest.approx(
                beyond_rounding(other.figures), rel=1e-11, abs=1e-12
            )
        assert one.heldout == pytest.approx(alone.heldout, rel=1e-11, abs=1e-12)


def beyond_rounding(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures without the accuracy of rewards that are all rounding, as before the first update."""
    rewards = [figures.get(f"rewards/{name}", 0.0) for name in ("chosen", "rejected")]
    alike = max(map(abs, rewards)) < 1e-12
    return {k: v for k, v in figures.items() if not (alike and k == "rewards/accuracies")}


class CountedAnswers(AnswerSet):
    """Answers that know which rows were laid into batches."""

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        READ.extend(indices)
        return super().batch(indices)


READ: list[int] = []


def test_a_reference_is_read_by_all_ranks_together() -> None:
    """Each reads its part of the rows; those that nobody asks for have no number on any."""
    _, plain = make("dpo")
    answers = CountedAnswers(plain.examples, plain.max_length)
    READ.clear()

    def work(ranks: Ranks) -> Tensor:
        one = Trained(ranks, settings("adamw"), torch.float64)
        what = one.model, answers, [0, 2], DEFAULT_SETTINGS
        return reference_log_probs(*what, False, ranks, tokens_per_batch=1)

    first, second = run_ranks(2, work)
    assert sorted(READ) == [0, 2]
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert first.isnan().any(1).tolist() == [False, True, False]


def test_a_reference_is_made_again_where_a_rank_has_not_stored_it(tmp_path: Path) -> None:
    """Machines may have folders of their own, of which one was emptied."""
    made: list[int] = []

    def work(ranks: Ranks) -> Tensor:
        def make_it() -> Tensor:
            made.append(ranks.rank)
            return torch.full((2, 2), float(sum(host_sums(ranks, 1))), dtype=torch.float64)

        where = tmp_path / str(ranks.rank), {"rows": "r"}, (2, 2)
        return stored_or_made(*where, make_it, ranks)

    for expected in ([0, 1], [0, 1], [0, 0, 1, 1]):
        if len(expected) == 4:
            shutil.rmtree(tmp_path / "1")
        tables = run_ranks(2, work)
        assert sorted(made) == expected and all(bool((t == 2).all()) for t in tables)


@pytest.mark.parametrize("kind", ["pipe", "device", "damaged", "no name that files can have"])
def test_a_reference_is_made_again_where_its_file_is_none(tmp_path: Path, kind: str) -> None:
    def make_it() -> Tensor:
        return torch.ones(2, 2, dtype=torch.float64)

    where = tmp_path / ("n" * (300 if "name" in kind else 1)), {"rows": "r"}, (2, 2)
    stored_or_made(*where, make_it)
    for file in where[0].iterdir() if "name" not in kind else ():
        if kind == "damaged":
            file.write_bytes(file.read_bytes() + b"more")
            continue
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero")
    assert bool((stored_or_made(*where, make_it) == 1).all())
