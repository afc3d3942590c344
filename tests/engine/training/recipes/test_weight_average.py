"""The moving average of trained weights: torch's own, in runs that stop, evaluate and save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import engine
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import plan
from engine.model_sources.open import describe_model
from models.weight_average import WeightAverage
from tests.support.small_runs import small_run, snapshot
from tests.support.tiny_model import GOLDEN

Rows = Callable[..., Path]
DECAY = 0.9
WEIGHTS = "adapter/adapter_model.safetensors"
WITHOUT = "adapter-without-ema/adapter_model.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_torchs(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).to(dtype)
    model[1].bias.requires_grad_(False)
    ours = WeightAverage(model.named_parameters(), DECAY)
    theirs = AveragedModel(model.float(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    model.to(dtype)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update()
        theirs.update_parameters(nn.Sequential(*model).float())
        model.to(dtype)
    expected = dict(theirs.module.named_parameters())
    assert ours.state_tensors().keys() == expected.keys() - {"1.bias"}
    for name, average in ours.state_tensors().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, expected[name].data, rtol=1e-6, atol=1e-7)


def test_weights_are_put_back_as_they_were() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    average = WeightAverage(model.named_parameters(), DECAY)
    with average.applied():  # before any update there is nothing to show
        assert average.updates == 0
    for _ in range(2):
        model.weight.data.add_(1.0)
        average.update()
    before, address = model.weight.detach().clone(), model.weight.data_ptr()
    with average.applied():
        assert not torch.equal(model.weight, before)
        assert model.weight.data_ptr() == address
    assert torch.equal(model.weight, before)


@pytest.fixture
def settings(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of six steps, each with a checkpoint, whose weights are averaged."""

    def make(name: str = "run", **changes: Any) -> TrainConfig:
        given: dict[str, Any] = {
            "method": "lora",
            "ema_decay": DECAY,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "heldout": 0.3,
            "dtype": "float32",
        }
        return small_run(tiny_model, write_rows(12), tmp_path / name, **(given | changes))

    return make


def test_the_result_is_the_average_and_the_last_weights_stand_beside_it(
    settings: Callable[..., TrainConfig], tiny_model: Path
) -> None:
    config = settings()
    result = engine.train(config, console=False)
    run, prefix = result.run_directory, "base_model.model."
    steps = [load_file(run / f"checkpoint-{n}" / "weights.safetensors") for n in range(1, 7)]
    average = {name: tensor.clone() for name, tensor in steps[0].items()}
    step = get_ema_multi_avg_fn(DECAY)
    for weights in steps[1:]:
        step(list(average.values()), [weights[name] for name in average], 1)
    for file, expected in ((WEIGHTS, average), (WITHOUT, steps[-1])):
        saved = load_file(run / file)
        assert len(saved) == len(expected)
        for name, tensor in expected.items():
            stored_name = f"{prefix}{name}.weight"
            torch.testing.assert_close(saved[stored_name], tensor, rtol=1e-6, atol=1e-9)
    assert result.metrics["ema_updates"] == 6
    folders = [run / "adapter", run / "adapter-without-ema"]
    records = [json.loads((folder / "base.json").read_text()) for folder in folders]
    assert [record.get("ema_decay") for record in records] == [DECAY, None]
    # The summary is about what is saved.
    given: dict[str, Any] = {"heldout": 0.3, "seed": 42, "dtype": "float32", "device": "cpu"}
    losses = [
        engine.evaluate(tiny_model, config.data, run / folder, **given).loss
        for folder in ("adapter", "adapter-without-ema")
    ]
    assert result.metrics["heldout_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)


class _Stop:
    """Ends a run after some steps."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, step: int, metrics: dict[str, Any]) -> bool:
        return step >= self._step


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "qlora", "lora_dropout": 0.1, "eval_every": 2, "save_best": "loss"},
        {"method": "full", "optimizer_in_backward": True, "max_grad_norm": 0, "eval_ema": True,
         "eval_every": 1, "load_best_at_end": True},
    ],
)  # fmt: skip
def test_a_run_goes_on_to_the_same_bytes(
    settings: Callable[..., TrainConfig], changes: dict[str, Any]
) -> None:
    whole = engine.train(settings("whole", **changes), console=False)
    engine.train(settings("cut", **changes), console=False, callbacks=[_Stop(3)])
    again = engine.resume(whole.run_directory.with_name("cut"), console=False)
    kind = "model" if changes["method"] == "full" else "adapter"
    for folder in (kind, f"{kind}-without-ema"):
        both = [snapshot(result.run_directory / folder) for result in (whole, again)]
        names = [name for name in both[0] if name.endswith(".safetensors")]
        assert names and all(both[0][name] == both[1][name] for name in names)
    assert whole.metrics["heldout_loss"] == again.metrics["heldout_loss"]


def test_evaluations_are_of_the_averages_where_that_is_asked(
    settings: Callable[..., TrainConfig], tiny_model: Path
) -> None:
    plain = engine.train(settings("plain", eval_every=3, ema_decay=None), console=False)
    last = engine.train(settings("last", eval_every=3), console=False)
    averaged = engine.train(
        settings("averaged", eval_every=3, eval_ema=True, save_best="loss"), console=False
    )
    losses = {
        result.run_directory.name: [
            line["eval_loss"] for line in result.history if "eval_loss" in line
        ]
        for result in (plain, last, averaged)
    }
    # Averaging changes neither a step nor, unless asked, an evaluation.
    assert losses["last"] == losses["plain"]
    assert [line["loss"] for line in averaged.history[1:]] == [
        line["loss"] for line in plain.history[1:]
    ]
    assert losses["averaged"][1:] != losses["plain"][1:]
    assert averaged.metrics["heldout_loss"] == losses["averaged"][-1]
    # The adapter in the best checkpoint is what was the best.
    step = averaged.metrics["best_step"]
    given: dict[str, Any] = {"heldout": 0.3, "seed": 42, "dtype": "float32", "device": "cpu"}
    best = engine.evaluate(
        tiny_model,
        settings().data,
        averaged.run_directory / f"checkpoint-{step}" / "adapter",
        **given,
    )
    assert best.loss == pytest.approx(averaged.metrics["best_value"], rel=1e-5)


def test_the_plan_counts_the_average_and_the_budget_holds_it(
    settings: Callable[..., TrainConfig],
) -> None:
    model = describe_model(GOLDEN / "llama").config
    plans = [
        plan(model, settings(gradient_checkpointing="full", ema_decay=decay, dtype="float32"),
             gpu=gpu, dtype=torch.float32)
        for gpu in (False, True) for decay in (None, DECAY)
    ]  # fmt: skip
    for without, with_average in (plans[:2], plans[2:]):
        extra = with_average.step.bytes - without.step.bytes
        assert with_average.step.owners["moving average"] == extra
        assert extra == pytest.approx(4 * without.trainable, rel=0.01)
    figures = [
        engine.train(settings(name, memory_budget="2GiB", ema_decay=decay), console=False).metrics
        for name, decay in (("without", None), ("with", DECAY))
    ]
    more = [
        figures[1][key] - figures[0][key] for key in ("measured_peak_bytes", "planned_peak_bytes")
    ]
    assert more[0] == more[1] == 4 * figures[0]["trainable_parameters"]


def test_averaged_evaluations_need_an_average(settings: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="ema_decay, which averages them"):
        settings(ema_decay=None, eval_ema=True)


def test_a_decay_that_remembers_more_steps_than_there_are_is_told(
    settings: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    engine.train(settings("short", ema_decay=0.999, heldout=0, max_steps=2))
    assert "remembers some 1000 steps, and the run has 2" in capsys.readouterr().err
    engine.train(settings("fits", ema_decay=0.5, heldout=0, max_steps=2))
    assert "remembers some" not in capsys.readouterr().err
