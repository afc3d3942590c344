"""Runs whose experts are divided among processes: steps, states and adapters of one."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import collate
from engine.distributed.deal import PassLimits, deal_by_cost
from engine.distributed.group import Group
from engine.distributed.mesh import Mesh, MeshSizes
from engine.errors import ConfigError
from engine.model_sources.load_model import LayerPlacement
from engine.runs.identity import RunIdentity
from engine.training.loop import Progress
from engine.training.processes.together import Optimization, resumed_together
from engine.training.saving import Going, RunState
from engine.training.step import StepResult, TrainingStep
from engine.training.trainable import make_average
from kernels.runtime.ranks import Ranks
from models.layers.packed_batch import PackedBatch
from models.memory.sharded_parameters import ParameterPiece
from models.over_ranks import gathered_experts, split_context, trained_elements
from tests.engine.distributed.test_data_parallel import COST, LENGTHS, WideAdamW
from tests.engine.distributed.test_processes import adapter, finished, lines, words
from tests.models.test_sharding import built
from tests.support.processes.rank_threads import run_on_mesh
from tests.support.small_runs import random_examples
from tests.support.tiny_model import write_tiny_model, write_tokenizer

STEPS = (((0, 1, 2), (3, 4, 5)), ((6, 7, 0), (2,)), ((3,),))


def settings(optimizer: str, **more: Any) -> TrainConfig:
    # A larger eps: gradients that are all rounding must not move a weight by the rate.
    rates = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.01}
    return TrainConfig(model="m", data="d", method="lora", optimizer=optimizer, **(rates | more))


def shares(step: tuple[tuple[int, ...], ...], ranks: Ranks) -> list[PackedBatch]:
    """The batches of a rank, as many as every other's."""
    rows = random_examples(1, LENGTHS)
    dealt = deal_by_cost(step, LENGTHS.__getitem__, COST, ranks.size, PassLimits(3))
    own = [collate([rows[index] for index in p.rows]) for p in dealt[ranks.rank]]
    return own + [PackedBatch.idle()] * (max(map(len, dealt)) - len(own))


class Loaded:
    """A checkpoint in memory, and what has no other."""

    path = Path("checkpoint-2")

    def __init__(self, saved: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self._saved, self.state = saved, state

    def tensors(self, stem: str) -> dict[str, Tensor]:
        return self._saved[stem]

    def resume(self, _: str | None) -> Loaded:
        return self


class Trained:
    """A mixture with adapters, and its state, on one rank."""

    def __init__(self, mesh: Mesh, config: TrainConfig, dtype: torch.dtype) -> None:
        self.mesh = mesh
        weights = mesh.weights
        layers = LayerPlacement(ranks=weights, vocabulary=weights, experts=mesh.experts)
        self.model = built("qwen3_moe", layers, dtype=dtype)
        if mesh.context.size > 1:
            split_context(self.model, mesh.context)
        self.optimization = Optimization.of(self.model, config, mesh)
        average = make_average(self.model, config)
        known = RunIdentity(config, {"base": "b"}, 1), self.model, self.optimization.state
        self.state = RunState(*known, average=average)
        optimizer, parallel = self.optimization.optimizer, self.optimization.parallel
        self.step = TrainingStep(
            self.model, optimizer, max_grad_norm=0.05, parallel=parallel, average=average
        )

    def steps(self, begin: int = 0, end: int = len(STEPS)) -> list[StepResult]:
        return [self.step(shares(STEPS[n], self.mesh.data), n) for n in range(begin, end)]

    def weights(self) -> dict[str, Tensor]:
        """The adapters of all ranks."""
        whole = self.state.weights(self.state.gathered())
        return {name: value.detach().clone() for name, value in whole.items()}

    @torch.no_grad()
    def taking(self, weights: dict[str, Tensor]) -> Trained:
        """This process alone, with these adapters."""
        for name, value in self.state.weights().items():
            value.copy_(weights[name])
        return self

    def norm(self, number: int) -> float:
        """That of the gradient of a step, which is made."""
        return self.steps(number, number + 1)[0].grad_norm

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file."""
        collected = self.state.collected(0)
        tensors = {
            "weights": self.state.weights(collected.pairs),
            "optimizer": collected.optimizer,
            "ema": collected.average,
        }
        return {
            kind: {name: value.detach().clone() for name, value in named.items()}
            for kind, named in tensors.items()
        }

    def restored(self, saved: dict[str, dict[str, Tensor]], updates: int) -> Trained:
        """This rank, going on from what others saved; only the first has read it."""
        group, how = Group(self.mesh.every), Going("none", 0)
        state = self.state.facts(Progress(step=2), how) | {"ema_updates": updates}
        loaded = cast(Any, Loaded(saved, state)) if group.leads else None
        resumed_together(self.state, loaded, how, group)
        return self


@dataclass(frozen=True)
class DividedSteps:
    """Steps, the weights before each of them and, with averages, after the last, and their size."""

    results: list[StepResult]
    before: list[dict[str, Tensor]]
    after: dict[str, Tensor]
    elements: int


def whole(config: TrainConfig, dtype: torch.dtype = torch.float32) -> Trained:
    return Trained(Mesh(), config, dtype)


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], eps: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0.0, atol=eps, msg=name)


def wide(named: Iterable[tuple[str, Tensor]], config: TrainConfig) -> WideAdamW:
    return WideAdamW([p for _, p in named if p.requires_grad], 1e-2)


def wide_pieces(pieces: Iterable[ParameterPiece], config: TrainConfig) -> WideAdamW:
    return WideAdamW([piece.parameter for piece in pieces], 1e-2)


DIVISIONS = [
    (2, MeshSizes(experts=2)),
    (4, MeshSizes(experts=2)),
    (3, MeshSizes(experts=3)),
    (2, MeshSizes(weights=True)),
    (2, MeshSizes(context=2)),
    (4, MeshSizes(context=2, weights=True)),
    (2, MeshSizes(experts=2, weights=True)),
    (2, MeshSizes(context=2, experts=2)),
    (4, MeshSizes(context=2, experts=2, weights=True)),
    (4, MeshSizes(context=4, experts=2, weights=True)),
]
"""What processes divide, several things at once too; the vocabulary with the weights."""


CASES = [
    *((*division, torch.float64) for division in DIVISIONS),
    *((*division, torch.float32) for division in DIVISIONS if division[1].context == 1),
    *((*DIVISIONS[number], torch.float32) for number in (4, 5, 9)),
]


@pytest.mark.parametrize(("size", "sizes", "dtype"), CASES)
def test_what_is_divided_is_trained_as_the_whole(
    size: int, sizes: MeshSizes, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, eps = settings("adamw", ema_decay=0.5), 1e-6 if dtype == torch.float32 else 1e-12
    if dtype == torch.float64:
        monkeypatch.setattr("engine.training.processes.together.optimizer_over", wide)
        monkeypatch.setattr("engine.training.processes.together.piece_optimizer", wide_pieces)

    def trained(mesh: Mesh) -> DividedSteps:
        one, before = Trained(mesh, config, dtype), []
        results: list[StepResult] = []
        for number in range(len(STEPS)):
            before.append(one.weights())
            results += one.steps(number, number + 1)
        assert one.state.average is not None
        averages = gathered_experts(one.model, one.state.average.state_tensors())
        return DividedSteps(results, before, one.weights() | averages, trained_elements(one.model))

    alone = trained(Mesh())
    every = run_on_mesh(size, sizes, trained)
    norms = [theirs.grad_norm for theirs in alone.results]
    errors = [0.0] * len(STEPS)
    if dtype == torch.float32:
        # Half an ulp of the weights, which any other order of sums may change, changes the next
        # gradient of this model by up to 2.4e-6: one process is asked at the same weights. There
        # its own sums are up to 3.2e-6 from those of fp64, by the processor, and ours may be so.
        before = [*enumerate(every[0].before)]
        norms = [whole(config).taking(weights).norm(number) for number, weights in before]
        monkeypatch.setattr("engine.training.processes.together.optimizer_over", wide)
        exact = [whole(config, torch.float64).taking(weights).norm(n) for n, weights in before]
        errors = [abs(norm - true) for norm, true in zip(norms, exact, strict=True)]
    for told in every:
        for mine, theirs, norm, error in zip(
            told.results, alone.results, norms, errors, strict=True
        ):
            assert mine.loss == pytest.approx(theirs.loss, rel=eps)
            # The norm is fp32, and its squares are added in another order.
            assert abs(mine.grad_norm - norm) <= max(eps * norm, 3e-7 * norm, error)
            assert mine.trained_tokens == theirs.trained_tokens
        assert_alike(told.after, alone.after, eps)
        assert told.elements == alone.elements


@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion8bit", "adamw"])
def test_any_number_of_ranks_goes_on_from_what_others_saved(optimizer: str) -> None:
    """What one saved is taken, and saved again, to the bits, whatever divides it."""
    config = settings(optimizer, learning_rate=1e-3, ema_decay=0.5)
    begun = whole(config)
    begun.steps(0, 2)
    first = begun.saved()
    begun.steps(2)

    def work(mesh: Mesh) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        one = Trained(mesh, config, torch.float32).restored(first, 2)
        before = one.saved()
        one.steps(2)
        return before, one.saved()

    for size, experts in ((2, 2), (3, 3), (4, 2)):
        for before, after in run_on_mesh(size, MeshSizes(experts=experts), work):
            for kind in ("weights", "optimizer", "ema"):
                assert_alike(before[kind], first[kind], 0.0)
            for kind in ("weights", "ema"):
                assert_alike(after[kind], begun.saved()[kind], 2e-6)


def test_blocks_of_states_that_hold_experts_of_two_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six experts of 2 x 32 are 384 elements: were they in 8 bits, half of them is no block."""
    monkeypatch.setattr("engine.training.processes.together.LEAST_8BIT", 256)

    def work(mesh: Mesh) -> None:
        with pytest.raises(ConfigError, match="some would be of two processes"):
            Trained(mesh, settings("adamw8bit"), torch.float32)
        Trained(mesh, settings("adamw"), torch.float32)

    run_on_mesh(2, MeshSizes(experts=2), work)


def test_a_number_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="expert_parallel is 3, which does not divide the 4"):
        MeshSizes(experts=3).check(4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture, rows, and what one process leaves."""
    folder = tmp_path_factory.mktemp("mixture")
    write_tiny_model(folder / "model", "qwen3_moe")
    # The model has 64 rows of its vocabulary.
    write_tokenizer(folder / "model", f"{string.ascii_lowercase}{string.digits} \n.?WI")
    rows = [
        {"prompt": f"What is {n}? " * (1 + n % 3), "response": f"It is {n}. " * (1 + n % 5)}
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output = finished("cli.main", *words(folder, "alone", *PLAIN))
    assert status == 0, output
    return folder


PLAIN = (
    *("--lora-dropout", "0", "--eps", "1e-4", "--method", "qlora"),
    *("--ema-decay", "0.7", "--eval-ema", "--eval-every", "4", "--load-best-at-end"),
)


@pytest.fixture(scope="module")
def divided(mixture: Path) -> Path:
    """And what two processes leave that divide experts and weights."""
    more = ("--gpus", "2", "--expert-parallel", "2", "--shard", "weights")
    status, output = finished("cli.main", *words(mixture, "divided", *PLAIN, *more))
    assert status == 0, output
    return mixture


def test_processes_with_experts_of_their_own_leave_what_one_does(divided: Path) -> None:
    assert_same_run(divided, "divided")
    figures = [
        json.loads((divided / name / "summary.json").read_text())["metrics"]
        for name in ("divided", "alone")
    ]
    assert figures[0]["trainable_parameters"] == figures[1]["trainable_parameters"]
    assert figures[0]["heldout_loss"] == pytest.approx(figures[1]["heldout_loss"], rel=1e-5)


ONE = ("--gpus", "1", "--expert-parallel", "1", "--shard", "none")


@pytest.mark.parametrize(
    ("first", "more"), [("divided", ONE), ("alone", ("--gpus", "4", "--expert-parallel", "2"))]
)
def test_any_number_of_processes_goes_on(divided: Path, first: str, more: tuple[str, ...]) -> None:
    run = divided / f"after-{first}"
    shutil.copytree(divided / first, run)
    how = (*PLAIN, *more, "--resume", str(run / "checkpoint-9"))
    status, output = finished("cli.main", *words(divided, run.name, *how))
    assert status == 0, output
    assert_same_run(divided, run.name)


def assert_same_run(folder: Path, name: str) -> None:
    for mine, other in zip(lines(folder, name), lines(folder, "alone"), strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), rel=1e-5)
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-6)
    best = json.loads((folder / name / "summary.json").read_text())["metrics"]["best_step"]
    for result in ("adapter", "adapter-without-ema", f"checkpoint-{best}/adapter"):
        assert_alike(adapter(folder, name, result), adapter(folder, "alone", result), 5e-6)
