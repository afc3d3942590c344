"""Groups that are started here: outcomes, signals, environments, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.config.train_config import TrainConfig
from engine.distributed.group import after_restart, joined, launched, leads
from engine.errors import ConfigError


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
