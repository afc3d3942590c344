"""A program's own code at the steps of a run, and the run's history as it returns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ConfigError
from tests.support.small_runs import adapter_bytes, small_run

Rows = Callable[..., Path]


class Recorder:
    """Notes every event; `end_at` is the step at which it asks for the end."""

    def __init__(self, end_at: int | None = None) -> None:
        self.events: list[tuple[str, Any]] = []
        self.lines: list[Mapping[str, Any]] = []
        self.end_at = end_at

    def on_step(self, step: int, line: Mapping[str, Any]) -> bool:
        self.events.append(("step", step))
        self.lines.append(line)
        return step == self.end_at

    def on_eval(self, step: int, figures: Mapping[str, float]) -> None:
        assert figures["eval_loss"] > 0
        self.events.append(("eval", step))

    def on_save(self, step: int, path: Path) -> None:
        assert (path / "MANIFEST.json").exists()
        self.events.append(("save", step))

    def on_end(self, result: engine.TrainResult) -> None:
        assert result.adapter_path is not None
        self.events.append(("end", result.metrics["steps"]))


@pytest.fixture
def settings(tiny_model: Path, write_rows: Rows, tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, **changes: Any) -> Any:
        given = {"heldout": 0.3, "eval_every": 2, "max_steps": 4, "lr_schedule": "constant"}
        return small_run(tiny_model, write_rows(9), tmp_path / name, **(given | changes))

    return make


def test_callbacks_are_told_of_everything_in_its_order(settings: Callable[..., Any]) -> None:
    recorder = Recorder()
    result = engine.train(settings("run"), console=False, callbacks=[recorder])
    assert recorder.events == [
        ("eval", 0),
        ("step", 1),
        ("eval", 2), ("step", 2), ("save", 2),
        ("step", 3),
        ("eval", 4), ("step", 4), ("save", 4),
        ("end", 4),
    ]  # fmt: skip
    start, *steps = result.history
    assert steps == recorder.lines
    assert start["step"] == 0
    assert start["eval_loss"] == result.metrics["heldout_loss_before"]
    assert [line["step"] for line in result.history if "eval_loss" in line] == [0, 2, 4]


def test_a_callback_ends_the_run_well_and_it_can_go_on(settings: Callable[..., Any]) -> None:
    result = engine.train(settings("run"), console=False, callbacks=[Recorder(end_at=3)])
    assert result.status == "Success"
    assert result.metrics["steps"] == 3
    assert (result.run_directory / "checkpoint-3").is_dir()
    whole = engine.train(settings("whole"), console=False)
    more = engine.resume(result.run_directory, console=False, callbacks=[Recorder()])
    assert adapter_bytes(result.run_directory) == adapter_bytes(whole.run_directory)
    assert [line["loss"] for line in more.history[1:]] == [x["loss"] for x in whole.history[1:]]
    assert more.history[0] == whole.history[0]


def test_a_subclass_writes_only_what_it_wants(settings: Callable[..., Any]) -> None:
    seen = []

    class OnlyTheEnd(engine.Callback):
        def on_end(self, result: engine.TrainResult) -> None:
            seen.append(result.status)

    engine.train(settings("run", max_steps=1), console=False, callbacks=[OnlyTheEnd()])
    assert seen == ["Success"]


def test_what_a_callback_raises_ends_the_run_and_the_checkpoints_stand(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    class Broken:
        def on_step(self, step: int, line: object) -> None:
            if step == 3:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.train(settings("run"), console=False, callbacks=[Broken()])
    assert "KeyError" in (tmp_path / "run" / "summary.json").read_text()
    assert engine.resume(tmp_path / "run", console=False).metrics["steps"] == 4


class Misspelled:
    def on_evaluate(self) -> None: ...


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Misspelled(), r"on_evaluate \(did you mean on_eval\?\)"),
        (print, "builtin_function_or_method has none of them"),
        (Recorder, r"write Recorder\(\)"),
    ],
)
def test_what_is_no_callback_is_refused(
    callback: object, words: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        engine.train(settings("run"), console=False, callbacks=[callback])
    assert not (tmp_path / "run").exists()
