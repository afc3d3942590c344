"""The range test of learning rates: its curve, its rule, and that it is the run's own steps."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from cli.from_settings import Verb, make_app
from cli.main import main
from engine.config.tasks.commands import train_command
from engine.config.tasks.workflow import TrainOptions
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, MemoryPlanError
from engine.sweeps.lr_range import LrCurve, has_diverged, range_rates
from tests.support.small_runs import preference_run, small_run, snapshot, write_pairs

Rows = Callable[..., Path]


def bowl(rates: tuple[float, ...], bottom: float) -> tuple[float, ...]:
    """Losses that fall from 5 to 1 around a tenth of `bottom`, and rise again behind it."""
    return tuple(
        3 - 2 * math.tanh(2 * math.log10(rate / (bottom / 10))) + 2 * max(0, rate / bottom - 1)
        for rate in rates
    )


def test_rates_grow_by_a_factor() -> None:
    rates = range_rates(7, 1e-6, 1.0)
    assert rates == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])


def test_the_suggestion_is_an_order_below_the_lowest_loss_and_close_to_the_steepest() -> None:
    rates = range_rates(200, 1e-6, 1.0)
    curve = LrCurve(rates, bowl(rates, 1e-2), diverged=False)
    assert curve.lowest is not None and curve.steepest is not None
    assert 1e-2 < curve.lowest < 3e-2  # the moving mean comes a little late
    assert curve.suggestion == float(f"{curve.lowest / 10:.1e}")
    assert 0.4 < curve.suggestion / curve.steepest < 2.5
    assert f"Suggested: {curve.suggestion:g}" in curve.text()
    low, high = curve.shown_losses()  # what rises to 200 in the end does not flatten the fall
    assert low < 1 and 5 < high < 10 < max(curve.losses)


def test_a_loss_that_only_rises_gives_no_suggestion() -> None:
    rates = range_rates(50, 1e-6, 1.0)
    curve = LrCurve(rates, tuple(1 + 10 * rate for rate in rates), diverged=True)
    assert (curve.lowest, curve.steepest, curve.suggestion) == (None, None, None)
    assert "No suggestion" in curve.text()


def test_a_loss_that_still_falls_at_the_end_says_so() -> None:
    rates = range_rates(50, 1e-6, 1.0)
    falling = LrCurve(rates, tuple(5 - math.log10(rate / 1e-6) / 2 for rate in rates), False)
    assert falling.suggestion == 0.1
    assert "a higher --lr-find-max" in falling.text()


def test_divergence_is_told_by_the_smoothed_loss() -> None:
    assert not has_diverged([2.0] * 10 + [9.0])
    assert has_diverged([2.0] * 10 + [50.0] * 3)
    assert has_diverged([2.0, math.nan])


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full", "optimizer": "muon", "dtype": "float32"},
        {"method": "full", "optimizer_in_backward": True, "max_grad_norm": 0, "dtype": "float32"},
        {"method": "qlora", "accumulate": 2, "lora_dropout": 0.1},
    ],
)
def test_its_steps_are_the_runs_own(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """At a rate that hardly grows, the losses are those of a run with a constant rate."""
    data, before = write_rows(9), snapshot(tiny_model)
    given = {"max_steps": 20, "lr_schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3}
    config = small_run(tiny_model, data, tmp_path / "run", **(given | changes))
    curve = engine.lr_find(config, steps=20, rates=(1e-3, 1e-3 * (1 + 1e-12)), console=False)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "lr_find.json",
        "lr_find.png",
    ]
    # The folder is still free for the run, and no weight has changed.
    run = engine.train(config, console=False)
    assert curve.losses == pytest.approx([line["loss"] for line in run.history], rel=1e-6)
    assert snapshot(tiny_model) == before
    stored = json.loads((tmp_path / "run" / "lr_find.json").read_text())
    assert stored["losses"] == list(curve.losses) and stored["suggestion"] == curve.suggestion
    assert stored["settings"]["seed"] == 42


def test_it_ends_where_the_loss_diverges(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    config = small_run(tiny_model, write_rows(5), tmp_path, method="full", optimizer="adamw")
    curve = engine.lr_find(config, steps=60, rates=(1e-5, 10.0), console=False)
    assert curve.diverged and 10 < len(curve.rates) < 60
    assert curve.suggestion is not None and 1e-5 < curve.suggestion < 1e-1


def test_preferences_have_a_range_test(tiny_model: Path, tmp_path: Path) -> None:
    config = preference_run(tiny_model, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "run")
    curve = engine.lr_find(config, steps=20, rates=(1e-5, 1e-1), console=False)
    assert curve.losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert curve.suggestion is not None


def test_the_memory_budget_holds_for_it(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> None:
    config = small_run(tiny_model, write_rows(5), tmp_path / "run", memory_budget=1 << 20)
    with pytest.raises(MemoryPlanError):
        engine.lr_find(config, steps=20, console=False)
    assert not (tmp_path / "run").exists()


def test_the_command_line_prints_the_suggestion_and_the_command_that_uses_it(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "--model", str(tiny_model), "--data", str(write_rows(9))]
    words += ["--output-dir", str(run), "--device", "cpu", "--max-length", "96", "--lr-find"]
    words += ["--lr-find-steps", "30", "--lr-find-max", "0.5", "--betas", "0.9,0.99"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    suggestion = json.loads((run / "lr_find.json").read_text())["suggestion"]
    assert f"Suggested: {suggestion:g}" in printed and str(run / "lr_find.png") in printed
    again = shlex.split(printed.strip().splitlines()[-1])
    assert again[:2] == ["engine", "train"] and "--lr-find" not in again
    assert main([*again[1:], "--max-steps", "1", "--no-plot"]) == 0
    settings = json.loads((run / "summary.json").read_text())["parameters"]
    assert settings["learning_rate"] == suggestion and settings["betas"] == [0.9, 0.99]


def test_a_command_of_settings_is_read_back_as_these_settings() -> None:
    config = TrainConfig(
        model="m",
        data=["a b.jsonl=0.5", "c.jsonl"],
        map={"prompt": "question"},
        betas=(0.8, 0.95),
        rank_pattern={"q_proj": 8},
        early_stopping="3,0.01",
        eval_every=5,
        eval_data=["e.jsonl"],
        offload=("checkpoints",),
        chat_template_kwargs={"enable_thinking": False},
        double_quant=False,
        packing=True,
        loss_chunk_tokens=512,
        memory_budget="8GiB",
        target_modules="q_proj,v_proj",
        seed=7,
    )
    words = shlex.split(train_command(config))[2:]
    read: list[TrainConfig] = []
    again = make_app(
        (
            Verb("train", (TrainOptions, TrainConfig), presets=True, json=False),
            lambda call: read.append(call.read(TrainConfig)),
        )
    )
    again(words, standalone_mode=False)
    assert read == [config]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr_find_steps": 50}, "is of --lr-find"),
        ({"lr_find": True, "dry_run": True}, "give one"),
        ({"lr_find": True, "lr_find_min": 0.1, "lr_find_max": 0.01}, "less than"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainOptions(**given)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in one process"):
        engine.lr_find(model="m", data="d", output_dir=tmp_path, gpus=2, console=False)


def test_a_run_that_goes_on_has_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes on with one"):
        engine.lr_find(model="m", data="d", output_dir=tmp_path, resume="auto", console=False)
