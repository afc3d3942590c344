"""Going on with a run: what it is bound to, what may change, and that refusals write nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.verbs.training.train
from engine.config.explain import Setting
from engine.config.sources import build, load_config
from engine.config.train_config import VERBS, TrainConfig
from engine.errors import ConfigError, EngineError
from engine.runs.identity import RunIdentity, require_same_run
from engine.runs.metrics import read_metrics
from engine.runs.signals import Interrupted, StopSignals
from engine.runs.stored import resume_config, resumed
from engine.verbs.training.resume import resume
from engine.verbs.training.status import describe_status, read_status
from engine.verbs.training.train import train
from tests.support.small_runs import small_run as config
from tests.support.small_runs import snapshot

Rows = Callable[..., Path]
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n"


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``stop_after(3)`` makes the next run stop, as by a signal, after its third step."""

    def arrange(steps: int) -> None:
        class Stops(StopSignals):
            reads = 0

            @property
            def requested(self) -> int | None:
                self.reads += 1
                return 2 if self.reads >= steps else None

        monkeypatch.setattr(engine.verbs.training.train, "StopSignals", Stops)

    return arrange


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(engine.verbs.training.train, "StopSignals", StopSignals)


@pytest.fixture
def stopped(
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    go_on: Callable[[], None],
) -> Path:
    """A run of 6 steps that was stopped after 3."""
    stop_after(3)
    with pytest.raises(Interrupted):
        train(config(tiny_model, write_rows(9), tmp_path / "run"), console=False)
    go_on()
    return tmp_path / "run"


def change_rows(model: Path, rows: Path) -> None:
    rows.write_text(rows.read_text().replace("abc", "abd", 1))


def remove_row(model: Path, rows: Path) -> None:
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))


def change_template(model: Path, rows: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_end|>\\n", "<|im_end|>"))


def change_tokenizer(model: Path, rows: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))


def change_weights(model: Path, rows: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_rows, "the rows of .*rows.jsonl changed"),
        (remove_row, "the rows of .*rows.jsonl changed"),
        (change_template, "the chat template of .*model changed"),
        (change_tokenizer, "the tokenizer of .*model changed"),
        (change_weights, "the weights of the base model .*model changed"),
    ],
)
def test_a_run_goes_on_only_with_what_it_began_with(
    change: Callable[[Path, Path], None], named: str, stopped: Path, tiny_model: Path
) -> None:
    rows = stopped.parent / "rows.jsonl"
    change(tiny_model, rows)
    before = snapshot(stopped)
    with pytest.raises(EngineError, match=named + r".*engine train --config .*--init-adapter"):
        resume(stopped, console=False)
    assert snapshot(stopped) == before


def test_files_may_move_because_their_contents_count(stopped: Path, tiny_model: Path) -> None:
    moved = stopped.parent / "elsewhere"
    moved.mkdir()
    rows = (stopped.parent / "rows.jsonl").rename(moved / "other.jsonl")
    model = tiny_model.rename(moved / "base")
    result = resume(stopped, console=False, data=str(rows), model=f"{model}/")
    assert result.metrics["steps"] == 6


def test_a_run_of_an_earlier_version_goes_on_with_one_warning(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = json.loads((stopped / "manifest.json").read_text())
    for name in ("digests", "template_date", "directory"):
        del manifest[name]
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    for path in stopped.glob("checkpoint-*"):  # the settings it had never heard of
        assert "warmup_steps" in json.loads((path / "state.json").read_text())
    assert resume(stopped, console=False).metrics["steps"] == 6
    told = [record for record in caplog.records if "earlier version" in record.getMessage()]
    assert len(told) == 1
    assert "digests" in json.loads((stopped / "manifest.json").read_text())


def test_a_run_whose_manifest_is_damaged_goes_on_with_a_warning_that_says_so(
    stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (stopped / "manifest.json").write_text("{")
    assert resume(stopped, console=False).metrics["steps"] == 6
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "manifest.json" in told
    assert "earlier version" not in told


@pytest.mark.parametrize("odd", [{"trajectory": 5}, {"trajectory": {"epochs": "x"}}])
def test_a_state_that_is_not_as_it_was_written_decides_nothing(
    odd: dict[str, Any], stopped: Path
) -> None:
    newest = stopped / "checkpoint-3" / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | odd))
    assert resume(stopped, console=False).metrics["steps"] == 6
    assert len(list(stopped.glob(".bad-checkpoint-3-*"))) == 1


def test_a_resumed_run_takes_everything_from_its_directory(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, stopped: Path
) -> None:
    train(config(tiny_model, write_rows(9), tmp_path / "whole"), console=False)
    resume(stopped, console=False)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line["loss"] for line in read_metrics(stopped / "metrics.jsonl")] == [
        line["loss"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "given",
    [
        {"resume": "RUN"},
        {"resume": "RUN/checkpoint-3"},
        {"resume": "auto", "output_dir": "RUN"},
        {"resume": "RUN", "checkpoint_every": 1, "keep_checkpoints": 5},
    ],
)
def test_every_way_to_name_a_run_is_the_same_run(given: dict[str, Any], stopped: Path) -> None:
    asked = {
        name: Setting(str(value).replace("RUN", str(stopped)), name)
        for name, value in given.items()
    }
    settings = build(TrainConfig, resumed(asked))
    assert settings.output_dir == stopped
    assert settings.max_steps == 6
    assert train(settings, console=False).metrics["steps"] == 6


def test_stored_settings_hold_no_verbs(ended: Path, tiny_model: Path, write_rows: Rows) -> None:
    settings = config(tiny_model, write_rows(9), ended, overwrite=True)
    train(settings, console=False)
    resume(ended, console=False)
    text = (ended / "config.yaml").read_text()
    summary = json.loads((ended / "summary.json").read_text())
    for verb in VERBS:
        assert verb not in text
        assert verb not in summary["parameters"]
    assert load_config(ended / "config.yaml").resume is None


def test_a_constant_schedule_can_be_prolonged_to_the_bits_of_the_longer_run(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(9)
    constant = {"lr_schedule": "constant", "warmup_ratio": 0.5, "lora_dropout": 0.1}
    train(config(tiny_model, data, tmp_path / "run", max_steps=2, **constant), console=False)
    for steps in (3, 6):
        resume(tmp_path / "run", max_steps=steps, console=False)
    del constant["warmup_ratio"]
    whole = config(tiny_model, data, tmp_path / "whole", max_steps=6, warmup_steps=1, **constant)
    train(whole, console=False)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rates = [
        [line["lr"] for line in read_metrics(tmp_path / n / "metrics.jsonl")]
        for n in ("run", "whole")
    ]
    assert rates[0] == rates[1]
    with pytest.raises(ConfigError, match="has done 6 steps and is asked for 3"):
        resume(tmp_path / "run", max_steps=3, console=False)
    epochs = resume(tmp_path / "run", epochs=2, console=False)
    assert epochs.metrics["steps"] == 10


def test_a_stable_schedule_can_be_prolonged_until_it_decays(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    stable = {"lr_schedule": "warmup_stable_decay", "warmup_steps": 1, "lr_decay_steps": 2}
    short = config(tiny_model, write_rows(9), tmp_path / "run", max_steps=4, **stable)
    before = RunIdentity(short, {"base": "b"}, 10)
    state = {"base": "b", "trajectory": short.trajectory(), "progress": {"step": 2}}
    longer = replace(before, config=short.model_copy(update={"max_steps": 9}))
    require_same_run(state, longer, tmp_path)
    with pytest.raises(ConfigError, match="warmup_stable_decay until it decays"):
        require_same_run(state | {"progress": {"step": 3}}, longer, tmp_path)


def test_more_steps_of_another_schedule_name_the_way(stopped: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(stopped, max_steps=20, console=False)
    words = str(caught.value).partition("from its result: ")[2]
    assert words == (
        f"engine train --config {stopped}/config.yaml --model {tiny_model} --init-adapter "
        f"{stopped}/adapter --output-dir {stopped}-2 --run-id run-2 --max-steps 14"
    )


def test_the_command_that_trains_on_works(ended: Path, tiny_model: Path) -> None:
    from engine.config.tasks.commands import continued

    words = continued(resume_config(ended), ended, 3).split()[2:]
    from cli import main as cli

    assert cli.main(["train", *words, "--log-level", "ERROR"]) == 0
    assert (Path(f"{ended}-2") / "adapter" / "adapter_model.safetensors").exists()


def test_a_stopped_run_says_so_and_how_to_go_on(stopped: Path) -> None:
    status = read_status(stopped)
    assert status["state"] == "stopped at step 3"
    text = "\n".join(describe_status(status))
    assert f"engine resume {stopped}" in text
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["stopped"] == {"signal": "SIGINT", "step": 3}
    assert f"`engine resume {stopped}`" in summary["error_message"]


def test_the_date_of_the_first_start_is_that_of_the_run(
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    stop_after: Callable[[int], None],
    go_on: Callable[[], None],
) -> None:
    path = tiny_model / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["chat_template"] = DATED + content["chat_template"]
    path.write_text(json.dumps(content))
    data = write_rows(9)
    day = {"template_date": "2020-02-29T12:34:56"}
    train(config(tiny_model, data, tmp_path / "whole", **day), console=False)
    stop_after(3)
    with pytest.raises(Interrupted):
        train(config(tiny_model, data, tmp_path / "run", **day), console=False)
    go_on()
    # The flags of the first start, without the date: it is the run's own.
    settings = config(tiny_model, data, tmp_path / "run", resume="auto")
    train(settings, console=False)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["template_date"] == "2020-02-29T12:34:56"
    assert len(manifest["starts"]) == 2


def test_a_template_without_a_date_given_takes_that_of_the_start(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    train(config(tiny_model, write_rows(4), tmp_path / "run", max_steps=1), console=False)
    stored = load_config(tmp_path / "run" / "config.yaml")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert stored.template_date == manifest["template_date"]
    assert stored.template_date is not None
    assert manifest["starts"][0]["time"][:2] == stored.template_date[:2]


def test_a_change_of_threads_is_told(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = json.loads((stopped / "manifest.json").read_text())
    manifest["machine"]["threads"] = torch.get_num_threads() + 3
    (stopped / "manifest.json").write_text(json.dumps(manifest))
    resume(stopped, console=False)
    assert any("sums may round differently" in r.getMessage() for r in caplog.records)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "holds no run"), ("nothing", "does not exist")):
        with pytest.raises(ConfigError, match=words):
            resume_config(tmp_path / name)


def test_bad_lines_reach_the_heldout_rows(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    data = write_rows(6)
    bad = tmp_path / "heldout.jsonl"
    rows = data.read_text().splitlines()
    bad.write_text("\n".join([*rows[:2], '{"prompt": "no answer"}', *rows[2:]]) + "\n")
    heldout = {"eval_data": str(bad), "max_steps": 1}
    with pytest.raises(EngineError, match=r"heldout\.jsonl:3"):
        train(config(tiny_model, data, tmp_path / "one", **heldout), console=False)
    strict = config(tiny_model, data, tmp_path / "two", bad_lines="skip:5%", **heldout)
    with pytest.raises(EngineError, match="more than the 5 %"):
        train(strict, console=False)
    lenient = config(tiny_model, data, tmp_path / "three", bad_lines="skip", **heldout)
    metrics = train(lenient, console=False).metrics
    assert metrics["rows_heldout"] == 6
    assert metrics["heldout_rows_skipped"] == 1
