"""Runs side by side: settings that differ, curves, final figures."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import engine
from cli.main import main
from engine.errors import ConfigError


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """``written("a", rate=1e-3)`` writes the files of a run of 40 steps."""

    def make(name: str, rate: float, steps: int = 40, **settings: object) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        config = {"model": "m", "learning_rate": rate, "output_dir": str(run), **settings}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [
            {
                "step": step,
                "epoch": step / 40,
                "loss": math.exp(-rate * 100 * step) + 1,
                "lr": rate,
                "grad_norm": 1.0,
                "tokens_per_second": 100.0,
            }
            | ({"eval_loss": 2 - step / 100} if step % 10 == 0 else {})
            for step in range(1, steps + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = {"steps": steps, "heldout_loss": 2 - rate, "train_seconds": 12.5}
        summary = {"status": "Success", "metrics": metrics, "verb": "train"}
        (run / "summary.json").write_text(json.dumps(summary))
        return run

    return make


def test_settings_that_differ_and_final_figures_stand_side_by_side(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [written("a", 1e-3), written("b", 5e-3, lora_rank=8)]
    comparison = engine.compare(runs)
    assert dict(comparison.settings()) == {
        "learning_rate": ["0.001", "0.005"],
        "lora_rank": [None, "8"],
    }
    figures = dict(comparison.figures())
    assert figures["heldout_loss"] == [1.999, 1.995]
    assert figures["loss"][0] == pytest.approx(math.exp(-4) + 1)
    assert main(["compare", *map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "model" not in text and "output_dir" not in text
    (rate,) = [line.split() for line in text.splitlines() if line.startswith("learning_rate")]
    assert rate == ["learning_rate", "0.001", "0.005"]
    lines = text.splitlines()
    first = lines.index("loss over the steps") + 2
    curve, other = lines[first : first + 2]
    assert curve.startswith("a  █") and other.startswith("b  ")
    assert curve.endswith("1.9048 to 1.0183 at step 40")
    # The faster curve ends lower, on one scale for both.
    assert other.split("  ")[1][-1] == "▁"


def test_json_has_curves_and_the_picture_is_one(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    runs = [written("a/run", 1e-3), written("b/run", 5e-3, steps=20)]
    picture = tmp_path / "curves" / "both.png"
    assert main(["compare", *map(str, runs), "--plot", str(picture), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told["runs"]] == ["a/run", "b/run"]
    curves = told["runs"][1]["curves"]
    assert curves["loss"]["steps"] == list(range(1, 21))
    assert curves["eval_loss"]["values"] == [1.9, 1.8]
    assert told["differing_settings"] == {"learning_rate": {"a/run": "0.001", "b/run": "0.005"}}
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_has_no_step_yet_is_compared_as_well(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("model: m\n")
    assert main(["compare", str(written("a", 1e-3)), str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "died" in text and "heldout_loss" in text


def test_what_is_no_run_or_only_one_is_refused(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    run = written("a", 1e-3)
    for runs, words in (
        ([run], "at least two runs"),
        ([run, run], "named twice"),
        ([run, tmp_path / "nothing"], "is no run"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.compare(runs)
