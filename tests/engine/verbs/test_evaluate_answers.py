"""engine eval --objective: what training says of held-out preferences, said of saved files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from engine.config.tasks.inference import EvalSettings
from engine.errors import ConfigError, DataError
from engine.verbs.models.evaluate_answers import evaluate_preferences
from engine.verbs.training.train import train
from tests.support.small_runs import preference_run, write_judged, write_pairs


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
def test_figures_are_those_of_the_run_that_held_the_rows_out(
    objective: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = write_judged if objective == "kto" else write_pairs
    data = write(tmp_path / "data.jsonl")
    files = [write(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 4), ("b", 3))]
    run = preference_run(
        tiny_model,
        data,
        tmp_path / "run",
        objective=objective,
        eval_data=[str(path) for path in files],
        beta=0.3,
        dtype="float32",
        max_steps=3,
    )
    metrics = train(run, console=False).metrics
    words = ["eval", "--model", str(tiny_model), "--adapter", str(tmp_path / "run"), "--json"]
    words += ["--objective", objective, "--beta", "0.3", "--device", "cpu"]
    words += [word for path in files for word in ("--data", str(path))]
    capsys.readouterr()
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == 7
    for name in ("loss", "rewards/accuracies", "rewards/margins", "loss/source/a.jsonl"):
        told = metrics[f"heldout_{name}"]
        assert figures[f"eval_{name}"] == pytest.approx(told, rel=1e-4, abs=1e-6)
    assert main([word for word in words if word != "--json"]) == 0
    assert "a.jsonl: accuracy" in capsys.readouterr().out


def test_a_named_reference_takes_the_place_of_the_model_without_adapter(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    asked = EvalSettings(
        model=str(tiny_model),
        data=(str(data),),
        objective="dpo",
        reference=str(tiny_model),
        device="cpu",
    )
    figures = evaluate_preferences(asked).figures
    assert figures["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_what_cannot_be_judged_is_refused(
    tiny_model: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    given: dict[str, Any] = {"model": str(tiny_model), "device": "cpu"}
    with pytest.raises(ConfigError, match="no --adapter is given"):
        evaluate_preferences(EvalSettings(data=(data,), objective="dpo", **given))
    plain = EvalSettings(data=(str(write_rows(3)),), objective="simpo", **given)
    with pytest.raises(DataError, match="learns from pairs"):
        evaluate_preferences(plain)
    for changes, said in (
        ({"beta": 0.1}, "are of preferences"),
        ({"objective": "simpo", "reference": "m"}, "has no reference"),
        ({"objective": "simpo", "gates": Path("g")}, "not preferences"),
    ):
        with pytest.raises(ConfigError, match=said):
            EvalSettings(data=(data,), **given, **changes)
