"""Runs that evaluate while they train: figures by part, the best checkpoint, an early end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import engine
from engine.errors import ConfigError
from engine.runs.metrics import read_metrics
from engine.verbs.training.status import describe_status, read_status
from tests.support.small_runs import adapter_bytes, small_run

Rows = Callable[..., Path]
WORST = {"greater_is_better": True}


@pytest.fixture
def heldout(tmp_path: Path) -> list[str]:
    """Two files of held-out rows of two categories."""
    files = []
    for name, categories in (("one.jsonl", "xy"), ("two.jsonl", "x")):
        rows = [
            {
                "prompt": f"Word {i}?",
                "response": "abc" * (i % 3 + 1),
                "category": categories[i % len(categories)],
            }
            for i in range(4)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(tmp_path / name))
    return files


@pytest.fixture
def evaluated(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, heldout: list[str]
) -> Callable[..., Any]:
    """Settings of a run whose held-out loss is greatest after its first step.

    Where the greatest is the best (`WORST`), that is the best step on every machine.
    """

    def settings(name: str, **changes: Any) -> Any:
        given = {
            "eval_data": heldout,
            "eval_every": 1,
            "max_steps": 8,
            "lr_schedule": "constant",
            "checkpoint_every": 2,
        }
        return small_run(tiny_model, write_rows(9), tmp_path / name, **(given | changes))

    return settings


def manifest(run: Path, step: int) -> dict[str, Any]:
    text = (run / f"checkpoint-{step}" / "MANIFEST.json").read_text()
    return dict(json.loads(text))


def test_losses_of_categories_and_sources_are_those_of_their_rows_alone(
    evaluated: Callable[..., Any], tiny_model: Path, heldout: list[str]
) -> None:
    result = engine.train(evaluated("run", max_steps=2), console=False)
    figures = read_metrics(result.run_directory / "metrics.jsonl")[-1]
    whole = engine.evaluate(tiny_model, heldout, result.adapter_path, quantize="nf4")
    assert figures["eval_loss"] == whole.loss == result.metrics["heldout_loss"]
    assert {f"eval_loss/{name}": loss for name, loss in whole.parts.items()} == {
        name: value for name, value in figures.items() if name.startswith("eval_loss/")
    }
    tokens = 0
    for name, choice in {
        "category/x": {"category": "x"},
        "category/y": {"category": "y"},
        "source/one.jsonl": {"data": heldout[0]},
        "source/two.jsonl": {"data": heldout[1]},
    }.items():
        asked = {"data": heldout} | choice
        alone = engine.evaluate(tiny_model, adapter=result.adapter_path, quantize="nf4", **asked)
        assert alone.loss == pytest.approx(whole.parts[name], rel=1e-6), name
        tokens += alone.tokens
    assert tokens == 2 * whole.tokens
    assert result.metrics["heldout_loss_before/category/x"] > figures["eval_loss/category/x"]


def test_the_best_checkpoint_stays_beside_the_newest_and_says_why(
    evaluated: Callable[..., Any], tiny_model: Path, heldout: list[str]
) -> None:
    result = engine.train(evaluated("run", save_best="eval_loss", **WORST), console=False)
    run = result.run_directory
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(run / "metrics.jsonl")}
    best = max(losses, key=lambda step: losses[step])
    assert best == 1
    names = {path.name for path in run.glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (best, 6, 8)}
    facts = {"metric": "eval_loss", "value": losses[best], "step": best}
    assert [manifest(run, step)["best"] for step in (best, 6, 8)] == [facts] * 3
    assert {name: result.metrics[f"best_{name}"] for name in facts} == facts
    assert result.metrics["heldout_loss"] == losses[8]
    status = read_status(run)
    assert status["best"] == facts
    assert f"best           eval_loss {losses[1]:.4f} after step 1" in describe_status(status)
    # The checkpoint is an adapter for every verb.
    asked = engine.evaluate(tiny_model, heldout, run / f"checkpoint-{best}", quantize="nf4")
    assert asked.loss == losses[best]


def test_the_result_has_the_best_weights_where_asked(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    plain = engine.train(evaluated("plain", save_best="eval_loss", **WORST), console=False)
    result = engine.train(evaluated("best", load_best_at_end=True, **WORST), console=False)
    run, best = result.run_directory, result.metrics["best_step"]
    assert result.metrics["heldout_loss"] == result.metrics["best_value"]
    assert result.metrics["best_value"] > plain.metrics["heldout_loss"]
    inside = run / f"checkpoint-{best}" / "adapter" / "adapter_model.safetensors"
    assert adapter_bytes(run) == inside.read_bytes() != adapter_bytes(plain.run_directory)
    again = engine.resume(run, console=False)  # it has ended: the same is written again
    assert again.metrics["heldout_loss"] == result.metrics["best_value"]
    assert adapter_bytes(run) == inside.read_bytes()


def test_full_fine_tuning_gets_its_best_weights_back(evaluated: Callable[..., Any]) -> None:
    changes = {"method": "full", "load_best_at_end": True, "max_steps": 4} | WORST
    result = engine.train(evaluated("run", **changes), console=False)
    assert result.output_path is not None
    best = result.metrics["best_step"]
    assert result.metrics["heldout_loss"] == result.metrics["best_value"]
    saved = load_file(result.run_directory / f"checkpoint-{best}" / "weights.safetensors")
    written = load_file(result.output_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert written[name].equal(saved[name])


def test_a_run_ends_where_evaluations_stop_improving(evaluated: Callable[..., Any]) -> None:
    result = engine.train(evaluated("run", early_stopping="2,0.5", **WORST), console=False)
    losses = [line["eval_loss"] for line in read_metrics(result.run_directory / "metrics.jsonl")]
    assert len(losses) == result.metrics["steps"] == 3
    assert (result.run_directory / "checkpoint-3").is_dir()
    # More patience goes on from there, to the bits of a run that had it from the start.
    more = engine.resume(result.run_directory, early_stopping="none", console=False)
    whole = engine.train(evaluated("whole"), console=False)
    assert more.metrics["steps"] == 8
    assert adapter_bytes(result.run_directory) == adapter_bytes(whole.run_directory)


def test_the_start_is_evaluated_unless_that_is_left_out(evaluated: Callable[..., Any]) -> None:
    result = engine.train(evaluated("run", eval_at_start=False, max_steps=1), console=False)
    assert "heldout_loss_before" not in result.metrics
    assert "heldout_loss" in result.metrics


def test_a_figure_of_no_evaluation_is_refused_before_a_weight_is_read(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    from engine.verbs.training.train import dry_run

    settings = evaluated("run", save_best="eval_loss/category/z")
    for verb in (dry_run, lambda config: engine.train(config, console=False)):
        with pytest.raises(ConfigError, match="category/x, eval_loss/category/y"):
            verb(settings)
    assert not (tmp_path / "run" / "manifest.json").exists()
