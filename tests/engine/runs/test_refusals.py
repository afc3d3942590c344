"""A start that is refused, or fails early, leaves the run that stands there as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import engine.verbs.training.train
from engine.errors import ConfigError, EngineError
from engine.runs.earlier import REPLACED
from engine.runs.metrics import read_metrics
from engine.verbs.training.train import train
from tests.support.small_runs import small_run as config
from tests.support.small_runs import snapshot

Rows = Callable[..., Path]

REFUSALS: dict[str, dict[str, Any]] = {
    "no verb": {},
    "another learning rate": {"resume": "auto", "learning_rate": 1e-3},
    "another rank": {"resume": "auto", "lora_rank": 4},
    "another seed": {"resume": "auto", "seed": 1},
    "another length of rows": {"resume": "auto", "max_length": 64},
    "more steps of a cosine": {"resume": "auto", "max_steps": 9},
    "fewer steps of a cosine": {"resume": "auto", "max_steps": 5},
    "another prompt": {"resume": "auto", "system_prompt": "Be brief."},
    "another method": {"resume": "auto", "method": "lora"},
    "data that is not there": {"resume": "auto", "data": "nope.jsonl"},
    "a model that is not there": {"resume": "auto", "model": "nope"},
    "a checkpoint that is not there": {"resume": "nope/checkpoint-2"},
    "overwrite, model": {"overwrite": True, "model": "modle"},
    "overwrite, data": {"overwrite": True, "data": "nope.jsonl"},
    "overwrite, target": {"overwrite": True, "target_modules": "v_prj"},
    "overwrite, policy": {"overwrite": True, "gradient_checkpointing": "full:99"},
    "overwrite, tracker": {"overwrite": True, "report_to": "wandb"},
    "overwrite, budget": {"overwrite": True, "memory_budget": "1MiB"},
    "overwrite, adapter": {"overwrite": True, "init_adapter": "nope"},
    "overwrite, own adapter": {"overwrite": True, "init_adapter": "RUN/adapter"},
    "overwrite, own rows": {"overwrite": True, "data": "RUN/metrics.jsonl"},
    "overwrite, float16": {"overwrite": True, "dtype": "float16"},
    "overwrite, graphs": {"overwrite": True, "cuda_graphs": True},
    "overwrite, rows of another kind": {"overwrite": True, "data": "RUN/../other.jsonl"},
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_writes_nothing_into_the_run(name: str, ended: Path, tiny_model: Path) -> None:
    changes = {
        key: str(ended) + value.removeprefix("RUN") if str(value).startswith("RUN") else value
        for key, value in REFUSALS[name].items()
    }
    before = snapshot(ended)
    given = {"model": tiny_model, "data": ended.parent / "rows.jsonl"} | changes
    settings = config(given.pop("model"), given.pop("data"), ended, **given)
    with pytest.raises(EngineError):
        train(settings, console=False)
    assert snapshot(ended) == before


def test_a_run_that_fails_while_weights_load_leaves_the_one_it_would_replace(
    ended: Path, tiny_model: Path
) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tiny_model / "model.safetensors", {"format": "pt"})
    before = snapshot(ended)
    settings = config(tiny_model, ended.parent / "rows.jsonl", ended, overwrite=True)
    with pytest.raises(EngineError, match="not finite"):
        train(settings, console=False)
    assert snapshot(ended) == before


def test_a_run_that_ends_before_its_first_checkpoint_gives_the_earlier_one_back(
    ended: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(ended)

    def fail(self: object) -> None:
        assert not (ended / "adapter").exists(), "the new run has begun"
        raise ConfigError("in the middle of the first step")

    monkeypatch.setattr(engine.verbs.training.train._Run, "train", fail)
    settings = config(tiny_model, ended.parent / "rows.jsonl", ended, overwrite=True)
    with pytest.raises(ConfigError, match="in the middle"):
        train(settings, console=False)
    after = snapshot(ended)
    del after[".lock"], before[".lock"]
    assert after == before


def test_a_replaced_run_is_moved_aside_until_the_next(ended: Path, tiny_model: Path) -> None:
    rows = ended.parent / "rows.jsonl"
    first = (ended / "adapter" / "adapter_model.safetensors").read_bytes()
    for seed in (1, 2):
        settings = config(tiny_model, rows, ended, overwrite=True, seed=seed, max_steps=2)
        train(settings, console=False)
        second = (ended / "adapter" / "adapter_model.safetensors").read_bytes()
        aside = ended / REPLACED / "adapter" / "adapter_model.safetensors"
        assert aside.read_bytes() == first != second
        first = second
        assert len(read_metrics(ended / "metrics.jsonl")) == 2


@pytest.mark.parametrize("state", [".waiting-run", ".moving-run"])
def test_a_kill_while_a_run_is_replaced_gives_it_back_at_the_next_start(
    state: str, ended: Path, tiny_model: Path
) -> None:
    before = snapshot(ended)
    aside = ended / state
    aside.mkdir()
    for path in list(ended.iterdir()):
        if path.name not in (".lock", state):
            path.rename(aside / path.name)
    (ended / "pipeline.log").write_text("of the run that was killed\n")
    settings = config(tiny_model, ended.parent / "rows.jsonl", ended)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train(settings, console=False)
    train(settings.model_copy(update={"resume": "auto"}), console=False)
    name = "adapter/adapter_model.safetensors"
    assert snapshot(ended)[name] == before[name]
    assert not aside.exists()


def test_files_of_others_are_not_written_over(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    for name in ("config.yaml", "model", "metrics.jsonl"):
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        if name == "model":
            shutil.copytree(tiny_model, folder / name)
        else:
            (folder / name).write_text("somebody's")
        before = snapshot(folder)
        for changes in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(ConfigError, match="which no run made"):
                train(config(tiny_model, write_rows(4), folder, **changes), console=False)
        assert snapshot(folder) == before


def test_a_typo_leaves_no_run_of_its_own(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config(tiny_model, write_rows(4), tmp_path / "x", target_modules="v_prj")
    with pytest.raises(ConfigError, match="v_prj"):
        train(settings.model_copy(update={"output_dir": None}), console=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["model", "teacher", "init_adapter"])
def test_a_run_is_not_written_among_the_files_that_it_reads(
    option: str, ended: Path, tiny_model: Path
) -> None:
    folder = ended / "adapter" if option == "init_adapter" else tiny_model
    before = snapshot(folder)
    settings = config(tiny_model, ended.parent / "rows.jsonl", folder)
    settings = settings.model_copy(update={option: str(folder)})
    with pytest.raises(ConfigError, match=r"both name .*\. Choose another --output-dir"):
        train(settings, console=False)
    assert snapshot(folder) == before


def test_the_summary_of_a_model_is_not_written_over(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    pruned = shutil.copytree(tiny_model, tmp_path / "pruned")
    (pruned / "summary.json").write_text('{"kind": "prune", "status": "Success"}')
    before = snapshot(pruned)
    with pytest.raises(ConfigError, match=r"holds summary.json, which no run made"):
        train(config(tiny_model, write_rows(4), pruned), console=False)
    assert snapshot(pruned) == before


def test_links_in_a_circle_are_refused(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(EngineError, match="circle"):
        train(config(tiny_model, write_rows(4), tmp_path / "circle"), console=False)
