"""Answers whose tokens are on several ranks: parts of a loss that add up to the whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.batches.sequences import AnswerSet
from engine.data.examples import Example
from engine.data.preferences import JudgedExample, PairExample
from engine.training.objectives.answer_losses import LossSettings
from engine.training.objectives.judged import JudgedObjective
from engine.training.objectives.objective import Objective
from engine.training.objectives.pairs import PairObjective
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.over_ranks import divide_experts, split_context
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

LENGTHS = (9, 14, 7)
SETTINGS = StepSettings(router_loss=0.1)


def answer(seed: int, prompt: int, tokens: int) -> Example:
    ids = np.random.default_rng(seed).integers(3, 60, prompt + tokens).astype(np.int32)
    ids[:prompt] = np.arange(3, 3 + prompt)
    return Example(ids, np.arange(prompt + tokens) >= prompt, f"row {seed}")


def make(kind: str) -> tuple[Objective, AnswerSet]:
    """An objective and the answers that it is about."""
    reference = torch.linspace(-2.0, 1.0, 6, dtype=torch.float64).view(3, 2)
    if kind == "kto":
        judged = [JudgedExample(answer(n, 5, t), n != 1) for n, t in enumerate(LENGTHS)]
        answers = AnswerSet(judged, 64)
        return JudgedObjective(answers, LossSettings(0.5), 1.0, 1.5, reference), answers
    pairs = [PairExample(answer(n, 5, t), answer(9 + n, 5, t + 4)) for n, t in enumerate(LENGTHS)]
    given = reference if kind == "dpo" else None
    return PairObjective(kind, LossSettings(0.5), 0.7, given), AnswerSet(pairs, 64, True)


@pytest.fixture
def model(golden: Callable[[str], Path]) -> Decoder:
    raw = json.loads((golden("qwen2_moe") / "config.json").read_text())
    model = Decoder(ModelConfig.from_dict(raw)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    return model


def step(
    model: Decoder, objective: Objective, batch: PackedBatch, ranks: Ranks = ONE_RANK
) -> dict[str, Tensor]:
    """The part of the loss, of the figures, and of every gradient."""
    totals = objective.totals(model, [batch], SETTINGS, ranks)
    share = objective.share(model, batch, SETTINGS, totals)
    share.loss.backward()
    assert share.figures is not None
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads | {"loss": share.loss.detach(), "figures": share.figures.detach()}


def assert_equal(got: Tensor, want: Tensor, name: str) -> None:
    assert float((got - want).abs().max()) <= 1e-12 * float(want.abs().max()), name


@pytest.mark.parametrize("kind", ["orpo", "dpo", "kto"])
def test_parts_of_an_answer_objective_add_up(kind: str, model: Decoder) -> None:
    objective, answers = make(kind)
    batch = answers.batch(range(len(LENGTHS)))

    def work(ranks: ThreadRanks) -> dict[str, Tensor]:
        own = copy.deepcopy(model)
        split_context(own, ranks)
        return step(own, objective, batch)

    parts = run_ranks(4, work)
    for name, want in step(model, objective, batch).items():
        assert_equal(torch.stack([part[name] for part in parts]).sum(0), want, name)


@pytest.mark.parametrize("kind", ["dpo", "orpo", "kto"])
def test_a_rank_without_answers_lends_its_experts(kind: str, model: Decoder) -> None:
    objective, answers = make(kind)
    batch = answers.batch(range(len(LENGTHS)))

    def work(ranks: ThreadRanks) -> dict[str, Tensor]:
        own = copy.deepcopy(model)
        divide_experts(own, ranks)
        return step(own, objective, PackedBatch.idle() if ranks.rank else batch, ranks)

    parts = run_ranks(2, work)
    for name, want in step(model, objective, batch).items():
        both = [part[name] for part in parts]
        expert = ".experts." in name
        assert_equal(torch.cat(both) if expert else torch.stack(both).sum(0), want, name)
