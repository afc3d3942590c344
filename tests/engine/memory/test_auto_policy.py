"""`--gradient-checkpointing auto` takes the fastest policy that fits; a resumed run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.choices import POLICIES
from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError
from engine.memory.auto_policy import _estimate, chunk_of, resolve_policy
from engine.memory.decoded import FREE_SHARE
from engine.memory.estimate import MemoryPlan, Workload, plan
from engine.memory.model_shapes import preset_config
from engine.memory.process import PROCESS
from engine.memory.search import changed, least_step
from engine.model_sources.open import open_model_source
from engine.verbs.training.train import train
from kernels.loss.linear_cross_entropy import chunk_tokens
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings

CPU = torch.device("cpu")
WORK = Workload(((300, 212),))


def settings(**values: object) -> TrainConfig:
    return TrainConfig(model="-", data=["-"], **values)


@pytest.fixture(scope="module")
def shape() -> ModelConfig:
    preset = preset_config("smollm2-135m")
    assert preset is not None
    return preset


def needed(shape: ModelConfig, policy: str) -> int:
    config = settings(gradient_checkpointing=policy)
    return plan(shape, config, gpu=False, dtype=torch.float32, work=WORK).total


def test_a_policy_that_is_named_is_taken(shape: ModelConfig) -> None:
    for policy in POLICIES:
        config = settings(gradient_checkpointing=policy)
        assert resolve_policy(shape, config, CPU, torch.float32, WORK, free=1) == policy


def test_auto_takes_the_fastest_policy_that_fits(shape: ModelConfig) -> None:
    totals = [needed(shape, policy) for policy in POLICIES]
    assert totals == sorted(totals, reverse=True)
    for policy, total in zip(POLICIES, totals, strict=True):
        free = int((total + 1) / FREE_SHARE["cpu"]) + 1
        assert resolve_policy(shape, settings(), CPU, torch.float32, WORK, free) == policy
        config = changed(settings(), memory_budget=total)
        assert resolve_policy(shape, config, CPU, torch.float32, WORK) == policy
    assert resolve_policy(shape, settings(), CPU, torch.float32, WORK, free=1) == "full"


def test_the_estimate_that_saves_a_plan_is_no_less_than_the_plan(shape: ModelConfig) -> None:
    for method in ("qlora", "lora", "full"):
        config = settings(gradient_checkpointing="none", method=method)
        exact = plan(shape, config, gpu=True, dtype=torch.bfloat16, work=WORK)
        assert _estimate(shape, config, WORK, torch.bfloat16, gpu=True) >= exact.allocated


@pytest.mark.parametrize("gpu", [False, True])
def test_plan_estimate_and_loss_take_the_same_chunk(shape: ModelConfig, gpu: bool) -> None:
    work, dtype = Workload(((4096, 4096),)), torch.bfloat16
    auto = settings(gradient_checkpointing="full")
    chunk = chunk_of(auto, shape, dtype, gpu)
    assert chunk == chunk_tokens(shape.vocab_size, 2, gpu=gpu) < work.tokens

    def made(config: TrainConfig) -> MemoryPlan:
        return plan(shape, config, gpu=gpu, dtype=dtype, work=work)

    whole = made(auto).step
    assert whole == made(changed(auto, loss_chunk_tokens=chunk)).step
    more = made(changed(auto, loss_chunk_tokens=2 * chunk)).step
    # The logits, and on a GPU 4 bytes a token for the kernel that reads them.
    assert 0 <= more.bytes - whole.bytes - chunk * shape.vocab_size * 2 <= 4 * chunk
    assert chunk_of(changed(auto, loss_chunk_tokens=48), shape, dtype, gpu) == 48


def test_a_resumed_run_keeps_its_policy(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policies: list[str] = []
    loss = Decoder.batch_loss

    def noted(model: Decoder, batch: Any, settings: StepSettings, **options: Any) -> Any:
        if model.device.type == "cpu":  # a plan's simulated step calls this too
            policies.append(settings.checkpointing)
        if policies == ["full", "full"]:
            raise RuntimeError("the power fails in the second step")
        return loss(model, batch, settings, **options)

    monkeypatch.setattr(Decoder, "batch_loss", noted)
    monkeypatch.setattr("engine.memory.auto_policy.free_memory", lambda device: 1)
    config = TrainConfig(
        model=str(tiny_model),
        data=[str(write_rows(8))],
        output_dir=tmp_path / "run",
        max_steps=3,
        checkpoint_every=1,
        device="cpu",
    )
    with pytest.raises(RuntimeError, match="power"):
        train(config, console=False)
    monkeypatch.setattr("engine.memory.auto_policy.free_memory", lambda device: 1 << 50)
    train(changed(config, resume="auto"), console=False)
    assert policies == ["full"] * 4
    train(changed(config, output_dir=tmp_path / "another"), console=False)
    assert policies[4:] == ["none"] * 3
    first, second = (
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("run", "another")
    )
    assert first == second


@pytest.fixture
def policies_planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Fills with (who asked, policy) of every plan that a run makes."""
    made: list[tuple[str, str]] = []

    def counting(where: str) -> Callable[..., MemoryPlan]:
        def counted(model: ModelConfig, config: TrainConfig, **options: Any) -> MemoryPlan:
            made.append((where, config.gradient_checkpointing))
            return plan(model, config, **options)

        return counted

    monkeypatch.setattr("engine.memory.auto_policy.plan", counting("policy"))
    monkeypatch.setattr("engine.memory.budget.plan", counting("budget"))
    return made


@pytest.mark.parametrize(
    ("method", "advice"),
    [("qlora", "checkpointing full.$"), ("full", "--optimizer-in-backward --max-grad-norm 0")],
)
def test_a_budget_below_the_largest_step_is_refused_after_two_plans(
    method: str,
    advice: str,
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policies_planned: list[tuple[str, str]],
) -> None:
    monkeypatch.setattr("engine.verbs.training.run_setup.build_for", pytest.fail)
    monkeypatch.setattr("engine.memory.process.process_bytes", lambda device: PROCESS)
    config = TrainConfig(
        model=str(tiny_model),
        data=[str(write_rows(8))],
        output_dir=tmp_path / "run",
        device="cpu",
        method=method,
    )
    checkpoint = open_model_source(str(tiny_model))
    least = plan(checkpoint.config, least_step(config), gpu=False, dtype=torch.float32).total
    with pytest.raises(MemoryPlanError, match=f"for its largest step.*{advice}"):
        train(changed(config, memory_budget=least), console=False)
    # One row of 8 tokens before rows are read, and the largest step of those read.
    assert policies_planned == [("budget", "full"), ("policy", "full")]


def test_the_choice_of_a_policy_and_the_budget_share_their_plan(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    policies_planned: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.memory.auto_policy._estimate", lambda *shape: 1 << 60)
    config = TrainConfig(
        model=str(tiny_model),
        data=[str(write_rows(8))],
        output_dir=tmp_path / "run",
        max_steps=1,
        device="cpu",
        memory_budget="8GiB",
        plot=False,
    )
    train(config, console=False)
    # The last compares what was measured with the largest step that was seen.
    assert policies_planned == [
        ("budget", "full"), ("policy", "full"), ("policy", "none"), ("budget", "none"),
    ]  # fmt: skip
