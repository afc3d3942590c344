"""Full fine-tuning divided among ranks: steps, checkpoints and models of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import collate
from engine.distributed.deal import PassLimits, deal_by_cost
from engine.distributed.group import Group
from engine.distributed.mesh import Mesh
from engine.errors import CheckpointError
from engine.inference.perplexity import evaluate_examples
from engine.model_sources.safetensors.file import save_file
from engine.runs.checkpoints import CheckpointStore
from engine.runs.identity import RunIdentity
from engine.training.loop import Progress
from engine.training.processes import shard_files
from engine.training.processes.divided_state import DividedState
from engine.training.processes.together import Optimization, resumed_together
from engine.training.saving import Going
from engine.training.step import StepResult, TrainingStep
from engine.training.trainable import make_average
from kernels.runtime.ranks import Ranks
from models.layers.packed_batch import PackedBatch
from models.sharding import WholeParameters, shard_parameters
from tests.engine.distributed.test_data_parallel import COST, LENGTHS, WideAdamW
from tests.engine.distributed.test_processes import finished, lines, words
from tests.models.test_sharding import built
from tests.support.processes.rank_threads import ThreadRanks, run_ranks
from tests.support.small_runs import random_examples
from tests.support.tiny_model import write_tiny_model

STEPS = (((0, 1, 2), (3, 4, 5)), ((6, 7, 0), (2,)), ((3,),), ((1, 2), (7,)))
Told = tuple[list[StepResult], dict[str, Tensor]]


def settings(optimizer: str, **more: Any) -> TrainConfig:
    # A larger eps: gradients that are all rounding must not move a weight by the rate.
    rates: dict[str, Any] = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.01}
    return TrainConfig(model="m", data="d", method="full", optimizer=optimizer, **rates | more)


class Trained:
    """A model of which every weight is trained, on one rank; its parts where there are several."""

    def __init__(
        self, ranks: Ranks, config: TrainConfig, dtype: torch.dtype, family: str = "llama"
    ) -> None:
        self.ranks, self.model = ranks, built(family, full=True, dtype=dtype)
        weights = ranks if ranks.size > 1 else None
        if weights is not None:
            shard_parameters(self.model, ranks)
        mesh = Mesh(ranks, ranks, weights=weights)
        self.optimization = Optimization.of(self.model, config, mesh)
        optimizer, parallel = self.optimization.optimizer, self.optimization.parallel
        average = make_average(self.model, config)
        self.step = TrainingStep(
            self.model, optimizer, max_grad_norm=0.05, parallel=parallel, average=average
        )
        identity = RunIdentity(config, {"base": "b"}, 1)
        known = identity, self.model, self.optimization.state
        self.state = DividedState(*known, average=average, ranks=ranks, own=optimizer)

    def steps(self, begin: int = 0, end: int = len(STEPS)) -> list[StepResult]:
        return [self.step(self._shares(n), n) for n in range(begin, end)]

    def _shares(self, number: int) -> list[PackedBatch]:
        rows, size = random_examples(1, LENGTHS), self.ranks.size
        dealt = deal_by_cost(STEPS[number], LENGTHS.__getitem__, COST, size, PassLimits(3))
        own = [collate([rows[index] for index in p.rows]) for p in dealt[self.ranks.rank]]
        return own + [PackedBatch.idle()] * (max(map(len, dealt)) - len(own))

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters, and behind them their averages where there are some."""
        averaged = {f"{name} on average": tensor for name, tensor in self._averages().items()}
        return self._whole() | averaged

    def _averages(self) -> dict[str, Tensor]:
        if self.state.average is None:
            return {}
        if self.ranks.size == 1:
            return {name: x.clone() for name, x in self.state.average.state_tensors().items()}
        with self.state.output_weights():
            return self._whole()

    def _whole(self) -> dict[str, Tensor]:
        if self.ranks.size == 1:
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}
        whole = WholeParameters(self.model)
        return {name: whole.parameter(name).clone() for name in whole.shapes}

    def evaluated(self) -> list[float]:
        """The loss with the averaged weights, and with those of the last step again."""
        rows = random_examples(1, LENGTHS)
        with self.state.output_weights():
            inside = evaluate_examples(self.model, rows, ranks=self.ranks).loss
        return [inside, evaluate_examples(self.model, rows, ranks=self.ranks).loss]

    def save(self, root: Path, step: int) -> None:
        """A checkpoint, as a run writes it."""
        collected = self.state.collected(step)
        if self.ranks.rank:
            collected.follow()
            return
        with CheckpointStore(root) as store, collected.led():
            where = Progress(step=step), Going("none", 0)
            self.state.save(store, *where, collected=collected)

    def restored(self, root: Path, step: int) -> Trained:
        """This rank, going on from a checkpoint; the first alone verifies it."""
        group, fresh = Group(self.ranks), Going("none", 0)
        config = self.state.config.model_copy(update={"resume": str(root / f"checkpoint-{step}")})
        state = replace(self.state, identity=replace(self.state.identity, config=config))
        with CheckpointStore(root) if group.leads else nullcontext() as store:
            progress, _ = resumed_together(state, store, fresh, group)
        assert progress.step == step
        return self


def wide(given: Iterable[Any], config: TrainConfig, *_: object) -> WideAdamW:
    """An optimizer in the parameters' own type, of names and parameters or of pieces."""
    return WideAdamW([one[1] if isinstance(one, tuple) else one.parameter for one in given], 1e-2)


def assert_alike(ours: Told, theirs: Told, eps: float) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=eps)
        # The norm is fp32, and its squares are added in another order.
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=max(eps, 3e-7))
        assert (mine.trained_tokens, mine.skipped) == (other.trained_tokens, other.skipped)
    assert ours[1].keys() == theirs[1].keys()
    for name, tensor in theirs[1].items():
        torch.testing.assert_close(ours[1][name], tensor, rtol=0.0, atol=eps, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_trained_as_the_whole(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimizer_over", "piece_optimizer"):
        monkeypatch.setattr(f"engine.training.processes.together.{name}", wide)

    def work(ranks: Ranks) -> tuple[Told, list[float]]:
        one = Trained(ranks, settings("adamw", ema_decay=0.5), torch.float64, family)
        return (one.steps(), one.weights()), one.evaluated()

    ((alone, losses),) = run_ranks(1, work)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    for one, evaluated in run_ranks(size, work):
        assert_alike(one, alone, 1e-12)
        assert evaluated == pytest.approx(losses, rel=1e-12)


def test_in_single_precision() -> None:
    def work(ranks: Ranks) -> Told:
        one = Trained(ranks, settings("adamw"), torch.float32)
        return one.steps(), one.weights()

    (alone,) = run_ranks(1, work)
    for one in run_ranks(2, work):
        assert_alike(one, alone, 2e-6)


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw8bit", None), ("lion8bit", 0.5)])
def test_a_divided_checkpoint_is_taken_by_any_number(
    optimizer: str, decay: float | None, tmp_path: Path
) -> None:
    """The same number goes on to the same bits; others take the same weights and states."""
    config = settings(optimizer, ema_decay=decay)

    def begin(ranks: ThreadRanks) -> tuple[dict[str, Tensor], Told]:
        one = Trained(ranks, config, torch.float32)
        one.steps(0, 2)
        one.save(tmp_path, 2)
        return one.weights(), (one.steps(2), one.weights())

    (saved, undisturbed), *_ = run_ranks(2, begin)
    folder = tmp_path / "checkpoint-2"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    kinds = ("weights", "optimizer") if decay is None else ("weights", "optimizer", "ema")
    assert names == {f"{kind}/rank-{rank}.safetensors" for kind in kinds for rank in range(2)}

    def go_on(ranks: ThreadRanks) -> tuple[dict[str, Tensor], Told]:
        one = Trained(ranks, config, torch.float32).restored(tmp_path, 2)
        if ranks.size == 3:
            one.save(tmp_path, 3)
        return one.weights(), (one.steps(2), one.weights())

    for taken, went_on in run_ranks(2, go_on):
        assert_alike(went_on, undisturbed, 0.0)
        assert all(torch.equal(taken[name], saved[name]) for name in saved)
    for taken, went_on in run_ranks(3, go_on):
        assert all(torch.equal(taken[name], saved[name]) for name in saved)
        assert went_on[0][0].loss == pytest.approx(undisturbed[0][0].loss, rel=1e-6)

    def back(ranks: ThreadRanks) -> Told:
        one = Trained(ranks, config, torch.float32).restored(tmp_path, 3)
        return one.steps(2), one.weights()

    for went_on in run_ranks(2, back):
        assert_alike(went_on, undisturbed, 0.0)


def test_a_disk_that_is_full_for_one_process_ends_the_save_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if path.name == "rank-1.safetensors":
            raise CheckpointError(f"Cannot write {path}: No space left on device (ENOSPC).")
        save_file(tensors, path)

    monkeypatch.setattr(shard_files, "save_file", full)

    def work(ranks: ThreadRanks) -> str:
        one = Trained(ranks, settings("adamw8bit"), torch.float32)
        try:
            one.save(tmp_path, 0)
        except CheckpointError as error:
            return str(error)
        return ""

    told = run_ranks(2, work)
    assert told[0].startswith("Rank 1 on ") and "No space left on device" in told[0]
    assert told[1] == ""
    assert not [path for path in tmp_path.iterdir() if "checkpoint" in path.name]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows, and what one process leaves that trains every weight."""
    folder = tmp_path_factory.mktemp("divided")
    write_tiny_model(folder / "model")
    rows = [
        {
            "prompt": f"What is {n}? " * (1 + n % 3),
            "chosen": f"It is {n}. " * (1 + n % 5),
            "rejected": f"No {n}. " * (1 + n % 4),
        }
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, output = finished("cli.main", *words(folder, "alone", *PLAIN))
    assert status == 0, output
    return folder


PLAIN = (
    *("--objective", "dpo", "--beta", "0.02", "--reference-cache", "none"),
    *("--lora-dropout", "0", "--method", "full", "--optimizer", "adamw"),
    *("--eps", "1e-3", "--learning-rate", "1e-3"),
    *("--ema-decay", "0.7", "--eval-ema", "--eval-every", "4", "--load-best-at-end"),
)


def test_processes_write_parts_and_one_model(alone: Path) -> None:
    """Two processes; four go on from a checkpoint of theirs. Both leave what one does."""
    more = ("--gpus", "2", "--shard", "weights")
    status, output = finished("cli.main", *words(alone, "parts", *PLAIN, *more))
    assert status == 0, output
    assert_same_run(alone, "parts")
    shutil.copytree(alone / "parts", alone / "again")
    checkpoint = alone / "again" / "checkpoint-9"
    how = ("--gpus", "4", "--shard", "weights", "--resume", str(checkpoint))
    status, output = finished("cli.main", *words(alone, "again", *PLAIN, *how))
    assert status == 0, output
    assert_same_run(alone, "again")
    checkpoint = alone / "parts" / "checkpoint-9"
    undivided = ("--gpus", "1", "--shard", "none", "--resume", str(checkpoint))
    status, output = finished("cli.main", *words(alone, "parts", *PLAIN, *undivided))
    assert status == 2 and "--shard weights" in output


def assert_same_run(folder: Path, name: str) -> None:
    for mine, other in zip(lines(folder, name), lines(folder, "alone"), strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), rel=1e-5)
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    figures = [
        json.loads((folder / run / "summary.json").read_text())["metrics"]
        for run in (name, "alone")
    ]
    assert figures[0]["trainable_parameters"] == figures[1]["trainable_parameters"]
    assert figures[0]["heldout_loss"] == pytest.approx(figures[1]["heldout_loss"], rel=1e-5)
    for result in ("model", "model-without-ema"):
        ours, theirs = (
            load_file(folder / run / result / "model.safetensors") for run in (name, "alone")
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-5, msg=key)
