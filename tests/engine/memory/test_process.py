"""A budget on a CPU is a wall around the whole process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError
from engine.memory.estimate import plan
from engine.memory.model_shapes import preset_config
from engine.memory.process import PROCESS, forget_peak, peak_resident, process_bytes
from engine.verbs.training.train import dry_run, train
from tests.support.small_runs import small_run

CPU = torch.device("cpu")


def settings(model: Path, data: Path, output: Path, budget: int) -> TrainConfig:
    return TrainConfig(
        model=str(model), data=str(data), output_dir=output, max_steps=1, device="cpu",
        plot=False, memory_budget=budget,
    )  # fmt: skip


@pytest.mark.parametrize("verb", [train, dry_run])
def test_a_budget_below_the_process_is_refused_before_anything_is_planned(
    verb: Callable[[TrainConfig], object],
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.memory.budget.plan", pytest.fail)
    with pytest.raises(MemoryPlanError) as refused:
        verb(settings(tiny_model, write_rows(4), tmp_path / "run", 150 << 20))
    text = str(refused.value)
    assert text.startswith("A memory budget of 150.00 MiB is less than the process itself")
    assert "Give more than --memory-budget" in text and "\n" not in text


def test_what_a_process_holds_already_counts(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a notebook that holds a model: the same budget would do for a process of its own.
    monkeypatch.setattr("engine.memory.process.process_bytes", lambda device: 3 << 30)
    with pytest.raises(MemoryPlanError, match=r"process itself takes .* 3\.00 GiB for Python"):
        train(settings(tiny_model, write_rows(4), tmp_path / "run", 2 << 30), console=False)


def test_the_process_is_measured_and_at_least_what_plans_assume() -> None:
    before = psutil.Process().memory_info().rss
    filled = torch.ones(max(0, PROCESS - before) + (64 << 20), dtype=torch.uint8)
    assert process_bytes(CPU) >= PROCESS + (32 << 20)
    assert process_bytes(CPU) == pytest.approx(before + filled.numel(), abs=16 << 20)
    assert process_bytes(torch.device("cuda")) == 0


def test_tensors_are_planned_alike_whatever_the_process_holds() -> None:
    model = preset_config("smollm2-135m")
    assert model is not None
    config = TrainConfig(model="-", data=["-"], batch_size=1, gradient_checkpointing="full")
    small, large = (
        plan(model, config, gpu=False, dtype=torch.float32, process=size) for size in (0, 1 << 30)
    )
    assert small.step == large.step and small.load == large.load
    assert large.total - small.total == 1 << 30


@pytest.mark.parametrize("at", [1, 3, None])
def test_a_run_ends_after_a_checkpoint_where_the_process_outgrows_its_budget(
    at: int | None,
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors stay within the plan; another part of the program takes what it did not plan."""
    budget = process_bytes(CPU) + (256 << 20)
    looked: list[bytearray] = []
    real = peak_resident

    def grown() -> int:
        looked.append(bytearray(b"\1") * ((512 << 20) if len(looked) + 1 == at else 1))
        return real()

    monkeypatch.setattr("engine.memory.budget.peak_resident", grown)
    config = small_run(tiny_model, write_rows(8), tmp_path / "run", memory_budget=budget)
    if at is None:
        result = train(config, console=False)
        assert 0 < result.metrics["resident_peak_bytes"] <= budget
        return
    with pytest.raises(MemoryPlanError, match=f"A checkpoint of step {at} of 6 is written") as told:
        train(config, console=False)
    looked.clear()
    assert "of resident memory, more than the memory budget of" in str(told.value)
    assert (tmp_path / "run" / f"checkpoint-{at}").is_dir()
    monkeypatch.setattr("engine.memory.budget.peak_resident", lambda: 0)
    more = {"resume": "auto", "memory_budget": 8 << 30}
    assert train(config.model_copy(update=more), console=False).metrics["steps"] == 6


def test_the_peak_is_of_what_was_resident_since_it_was_forgotten() -> None:
    forget_peak()
    before = peak_resident()
    filled = bytearray(b"\1") * (200 << 20)
    del filled
    assert peak_resident() >= before + (190 << 20)
    forget_peak()
    assert peak_resident() < before + (100 << 20)
