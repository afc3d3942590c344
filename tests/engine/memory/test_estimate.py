"""Presets, the search for settings that fit, refusals, and a run held to its budget."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, MemoryPlanError
from engine.memory.budget import require_space
from engine.memory.estimate import MemoryPlan, plan
from engine.memory.find_model import find_model
from engine.memory.model_shapes import PARAMETERS, preset_config
from engine.memory.process import PROCESS
from engine.memory.search import changed, choose, longest, smallest
from engine.memory.simulate.meter import MemoryMeter
from engine.verbs.training.train import train
from kernels.runtime.scratch import release
from models.tensor_names import expected_tensors

Rows = Callable[..., Path]
GIB = 2**30
ROOT = Path(__file__).parents[3]


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", **{"gradient_checkpointing": "selective"} | changes)


def planner(name: str) -> Callable[[TrainConfig], MemoryPlan]:
    model = preset_config(name)
    assert model is not None
    return lambda config: plan(model, config, gpu=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    model = preset_config(name)
    assert model is not None
    count = sum(math.prod(shape) for shape in expected_tensors(model).values())
    assert count == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3.5-0.8b", 0.75),
        ("qwen3.5-2b", 1.88),
        ("qwen3.5-4b", 4.21),
        ("qwen3.5-9b", 8.95),
        ("qwen3.5-27b", 26.90),
        ("qwen3.5-35b-a3b", 34.66),
        ("qwen3-next-80b-a3b", 79.67),
    ],
)
def test_the_text_part_of_a_larger_model_has_its_number_of_parameters(
    name: str, billions: float
) -> None:
    model = preset_config(name)
    assert model is not None
    count = sum(math.prod(shape) for shape in expected_tensors(model).values())
    assert count / 1e9 == pytest.approx(billions, abs=0.0051)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("Qwen/Qwen1.5-0.5B-Chat", "qwen1.5-0.5b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("HuggingFaceTB/SmolLM3-3B-Base", "smollm3-3b"),
    ],
)
def test_a_publishers_id_needs_no_hub(model: str, name: str) -> None:
    assert find_model(model)[0] == preset_config(name)


@pytest.mark.parametrize(
    "model",
    ["someone/qwen3-8b", "Qwen/Qwen3-8B-FP8", "mistralai/Mistral-7B-v0.1", "a/Qwen/qwen3-8b"],
)
def test_another_id_is_no_preset(model: str) -> None:
    assert preset_config(model) is None


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean llama-3\.1-8b"):
        find_model("llama-3.1-8")


def test_a_config_file_is_enough(tmp_path: Path, golden: Callable[[str], Path]) -> None:
    text = (golden("qwen3") / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "config.json"):
        model, _ = find_model(str(path))
        assert model.hidden_size == json.loads(text)["hidden_size"]


def test_eight_billion_parameters_are_planned_as_their_layout_says() -> None:
    made = planner("llama-3.1-8b")(
        settings(batch_size=1, max_length=2048, gradient_checkpointing="full")
    )
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert made.step.owners["NF4 base"] == pytest.approx(linear * (0.5 + 1 / 64), rel=2e-3)
    assert made.step.owners["embeddings"] == made.step.owners["head"] == 128_256 * 4096 * 2
    assert made.trainable == 41_943_040
    # Products forward, twice backward with the recomputed ones, of every linear weight and the head
    assert 6 * linear < made.flops / made.tokens < 7 * (linear + 128_256 * 4096)


def test_operations_of_a_token_do_not_depend_on_how_few_there_are() -> None:
    """Other kernels multiply few rows; attention's part is small beside the weights'."""
    make = planner("llama-3.1-8b")
    few, many = (
        make(settings(batch_size=1, max_length=n, gradient_checkpointing="none")) for n in (64, 512)
    )
    assert few.flops / few.tokens == pytest.approx(many.flops / many.tokens, rel=0.03)


def test_the_search_takes_the_fastest_settings_that_fit() -> None:
    make = planner("smollm2-360m")
    asked = settings(batch_size=4, max_length=512)
    roomy = choose(asked, 80 * GIB, make)
    assert roomy.plan.config.gradient_checkpointing == "none"
    assert roomy.plan.config.batch_size == 4
    totals = {
        policy: make(changed(asked, gradient_checkpointing=policy)).total
        for policy in ("none", "selective", "full")
    }
    assert totals["full"] < totals["selective"] < totals["none"]
    tight = choose(asked, totals["none"] - 1, make)
    assert tight.plan.total < totals["none"]
    assert tight.changes
    config = tight.plan.config
    assert config.batch_size * config.accumulate == 4
    assert (config.lora_rank, config.max_length) == (16, 512)


def test_rows_are_cut_only_when_nothing_else_fits() -> None:
    make = planner("smollm2-360m")
    asked = settings(batch_size=2, max_length=4096)
    least = smallest(asked, make)
    assert least.batch_size * least.accumulate == 2
    budget = make(changed(least, max_length=1000)).total
    choice = choose(asked, budget, make)
    assert choice.plan.total <= budget
    assert 900 <= choice.plan.config.max_length <= 1000
    assert "cut" in choice.why


def test_what_cannot_fit_is_refused_with_the_amount_and_three_ways_out() -> None:
    with pytest.raises(MemoryPlanError) as refused:
        choose(settings(), 4 * GIB, planner("llama-3.3-70b"))
    text = str(refused.value)
    assert "too much" in text and "head" in text
    assert text.split("Ways out: ")[1].count(";") == 2
    assert "--memory-budget" in text


def test_a_refusal_plans_the_least_settings_and_the_ways_out_alone() -> None:
    make, made = planner("qwen3-0.6b"), []

    def counted(config: TrainConfig) -> MemoryPlan:
        made.append(config)
        return make(config)

    with pytest.raises(MemoryPlanError, match="too much"):
        choose(settings(batch_size=8, max_length=4096), GIB // 2, counted)
    # One tells what memory options there are, one takes them all, and two ways out are to be
    # priced.
    assert len(made) == 4
    assert max(config.max_length * config.batch_size for config in made) == 64


def test_the_first_plan_of_a_process_is_that_of_every_later_one() -> None:
    # What torch and the kernels make once must not be counted, nor be kept until it is collected.
    script = (
        "import gc, torch; gc.disable()\n"
        "from engine.config.train_config import TrainConfig\n"
        "from engine.memory.model_shapes import preset_config\n"
        "from engine.memory.estimate import plan\n"
        "config = TrainConfig(model='m', data='d', max_length=8, gradient_checkpointing='full')\n"
        "model = preset_config('qwen3-8b')\n"
        "for _ in range(2):\n"
        "    print(plan(model, config, gpu=True, dtype=torch.bfloat16).step.owners)\n"
    )
    words = [sys.executable, "-c", script]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    first, second = out.stdout.splitlines()
    assert first == second


def test_the_longest_row_fits_and_one_step_longer_does_not() -> None:
    make = planner("smollm2-135m")
    config = settings(batch_size=1, gradient_checkpointing="full")
    budget = 2 * GIB
    tokens = longest(config, budget, make, 1 << 16)
    assert tokens is not None
    assert make(changed(config, max_length=tokens)).total <= budget
    assert make(changed(config, max_length=tokens + 64)).total > budget


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * GIB), ("8GB", 8 * 10**9), ("900 MiB", 900 << 20)]
)
def test_a_budget_is_written_with_its_unit(text: str, size: int) -> None:
    assert settings(memory_budget=text).memory_budget == size


@pytest.mark.parametrize("text", ["8", "eight", "-1GiB"])
def test_a_budget_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="GiB"):
        settings(memory_budget=text)


def run_settings(model: Path, data: Path, output: Path, budget: str) -> TrainConfig:
    return TrainConfig(
        model=str(model), data=str(data), output_dir=output, max_steps=3, batch_size=2,
        max_length=64, device="cpu", plot=False, memory_budget=budget,
    )  # fmt: skip


def test_a_run_puts_plan_and_measurement_side_by_side(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Buffers of earlier tests in this process are larger than this run's.
    release()
    run = tmp_path / "run"
    train(run_settings(tiny_model, write_rows(9), run, "8GiB"), console=False)
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    planned, measured = metrics["planned_peak_bytes"], metrics["measured_peak_bytes"]
    # 1.4 MB in all: the step's few scalars and index tensors are a percent of it.
    assert planned == pytest.approx(measured, rel=0.02)
    assert measured <= metrics["planned_limit_bytes"] * 1.02
    assert metrics["memory_budget_bytes"] == 8 * GIB


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2},
        {"dtype": "bfloat16", "gradient_checkpointing": "full"},
        {"optimizer": "adamw"},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0},
        {"optimizer_in_backward": True, "max_grad_norm": 0.0, "gradient_checkpointing": "full"},
    ],
)
def test_full_fine_tuning_is_held_to_its_budget_and_measured(
    changes: dict[str, Any],
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release()
    run = tmp_path / "run"
    config = run_settings(tiny_model, write_rows(9), run, "8GiB")
    train(changed(config, method="full", **changes), console=False)
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    planned, measured = metrics["planned_peak_bytes"], metrics["measured_peak_bytes"]
    assert planned == pytest.approx(measured, rel=0.03)
    assert measured <= metrics["planned_limit_bytes"]


def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.verbs.training.run_setup.build_for", pytest.fail)
    with pytest.raises(MemoryPlanError, match=r"memory budget of 1\.00 MiB"):
        train(run_settings(tiny_model, write_rows(9), tmp_path / "run", "1MiB"), console=False)


@pytest.fixture
def plans_of_budget(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fills with the settings of every plan that a run's budget makes."""
    made = []

    def counted(model: Any, config: TrainConfig, **options: Any) -> MemoryPlan:
        made.append(config)
        return plan(model, config, **options)

    monkeypatch.setattr("engine.memory.budget.plan", counted)
    return made


def test_a_run_of_which_no_row_fits_is_refused_before_rows_are_read(
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plans_of_budget: list[Any],
) -> None:
    monkeypatch.setattr("engine.memory.process.process_bytes", lambda device: PROCESS)
    monkeypatch.setattr(
        "engine.training.row_set.read_chosen", lambda *args: pytest.fail("rows were read")
    )
    config = run_settings(tiny_model, write_rows(9), tmp_path / "run", "1MiB")
    with pytest.raises(MemoryPlanError, match="Ways out"):
        train(changed(config, memory_budget=PROCESS + (GIB >> 11)), console=False)
    assert len(plans_of_budget) == 5


def test_a_run_that_memory_options_would_fit_is_sent_to_the_search(
    plans_of_budget: list[Any],
) -> None:
    model = preset_config("qwen3-8b")
    assert model is not None
    gpu, config = torch.device("cuda"), settings(memory_budget="4GiB")
    with pytest.raises(MemoryPlanError, match="`engine plan` with the same settings finds some"):
        require_space(config, model, gpu, torch.bfloat16, 0)
    assert len(plans_of_budget) == 2
    require_space(changed(config, memory_budget=12 * GIB), model, gpu, torch.bfloat16, 0)
    assert len(plans_of_budget) == 3


def test_a_step_that_goes_over_the_budget_is_stopped(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(MemoryMeter, limit=1 << 19)
    monkeypatch.setattr("engine.memory.budget.MemoryMeter", lambda limit: small())
    with pytest.raises(MemoryPlanError, match="This step holds"):
        train(run_settings(tiny_model, write_rows(9), tmp_path / "run", "8GiB"), console=False)
