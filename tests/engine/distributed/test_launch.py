"""Groups that are started here: outcomes, signals, environments, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.config.train_config import TrainConfig
from engine.distributed.group import (
    after_restart,
    joined,
    launched,
    leads,
    refuse_tasks_alone,
)
from engine.distributed.launch import GroupOutcome, Processes
from engine.errors import ConfigError
from engine.training.checks import check_run


def test_a_process_without_torchruns_variables_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not launched() and leads()
    with joined("cpu", 10) as group:
        assert group.is_alone and group.leads


def test_a_group_of_one_needs_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined("cpu", 10) as group:
        assert group.is_alone and launched()


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpiexec")],
)
def test_tasks_of_another_launcher_do_not_each_train_alone(
    monkeypatch: pytest.MonkeyPatch, variable: str, launcher: str
) -> None:
    monkeypatch.setenv(variable, "1")
    refuse_tasks_alone()
    monkeypatch.setenv(variable, "8")
    for gpus in (1, 8):
        with pytest.raises(ConfigError, match=f"{launcher} started this command 8 times"):
            engine.train(model="m", data="d", gpus=gpus)
    monkeypatch.setenv("RANK", "0")  # torchrun in a task knows better
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_tasks_alone()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": None}, "MASTER_ADDR (not set)"),
    ],
)
def test_an_environment_that_cannot_be_joined_is_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], text: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused, joined("cpu", 10):
        pass
    assert text in str(refused.value)


def test_a_start_after_a_failure_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrainConfig(model="m", data="d")
    assert after_restart(config) is config
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="--output-dir"):
        after_restart(config)
    named = TrainConfig(model="m", data="d", output_dir=tmp_path, overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert after_restart(named) is named
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = after_restart(named)
    assert (again.resume, again.overwrite) == ("auto", False)


def test_what_other_processes_cannot_have_is_refused(tmp_path: Path) -> None:
    class Told:
        def on_step(self, step: int, line: Any) -> None:
            """Never called."""

    rows = [{"prompt": "a", "response": "b"}]
    settings: dict[str, Any] = {"model": "m", "gpus": 2, "output_dir": tmp_path / "run"}
    with pytest.raises(ConfigError, match="callbacks"):
        engine.train(data="rows.jsonl", callbacks=[Told()], **settings)
    with pytest.raises(ConfigError, match="rows"):
        engine.train(data=rows, **settings)
    assert not (tmp_path / "run").exists()


def test_what_processes_left_is_told_as_one_process_tells_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The upload is that of the first process, and is not done again here."""
    facts = {
        "output": str(tmp_path / "run" / "adapter"),
        "metrics": {"steps": 1, "heldout_loss_before": 3.0, "heldout_loss": 2.0},
        "next": ["engine eval"],
        "pushed": "https://hub/me/it",
    }
    line = {"step": 1, "loss": 2.5}

    def started(config: TrainConfig, console: bool) -> dict[str, Any]:
        assert config.output_dir is not None
        config.output_dir.mkdir()
        (config.output_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return facts

    monkeypatch.setattr("engine.verbs.training.train.train_in_processes", started)
    monkeypatch.setattr("engine.verbs.training.train.publish_folder", pytest.fail)
    result = engine.train(model="m", data="d", gpus=2, output_dir=tmp_path / "run")
    assert (result.pushed, result.next) == ("https://hub/me/it", ("engine eval",))
    assert result.adapter_path == result.output_path == tmp_path / "run" / "adapter"
    assert result.history == [{"step": 0, "eval_loss": 3.0}, line]


def test_settings_that_were_not_given_are_not_given_to_the_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else an adapter to start from could not decide them (`with_init_adapter`)."""
    jobs: list[dict[str, Any]] = []

    def ended(module: str, job: dict[str, Any], processes: Processes) -> GroupOutcome:
        jobs.append(job)
        return GroupOutcome({"error": "enough", "kind": "ConfigError"})

    monkeypatch.setattr("engine.training.processes.started.run_group", ended)
    with pytest.raises(ConfigError, match="enough"):
        engine.train(model="m", data="d", gpus=2, init_adapter="a", output_dir=tmp_path)
    given = TrainConfig(**jobs[0]["settings"])
    assert {"model", "gpus", "init_adapter", "output_dir", "run_id"} <= given.model_fields_set
    assert not {"lora_rank", "lora_alpha", "target_modules"} & given.model_fields_set


@pytest.mark.parametrize(
    "asked", [{"shard": "weights"}, {"context_parallel": 2}, {"expert_parallel": 2}]
)
def test_one_process_shares_nothing_whatever_is_asked_of_it(asked: dict[str, Any]) -> None:
    config = TrainConfig(model="m", data="d", **asked)
    with pytest.raises(ConfigError, match="and there is one"):
        check_run(config, None, torch.device("cpu"), torch.float32)
