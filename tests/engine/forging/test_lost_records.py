"""A job whose records were damaged, moved or do not fit its rows any more."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config.tasks.pruning import ForgeSettings, PruneSettings
from engine.errors import CheckpointError, ConfigError
from engine.forging.stages import Stages
from engine.verbs.models.forge import forge
from tests.support.small_runs import small_run


@pytest.mark.parametrize("damage", ["", "{}", "5", "[" * 9999, '{"rows": 4}', "flip"])
def test_a_record_that_is_not_as_it_was_written_is_set_aside_and_made_again(
    damage: str, tmp_path: Path
) -> None:
    job = Stages(tmp_path, {}, resume=True)
    result = {"rows": 3, "name": "a\udcff", "by_layer": {2: 1.5, 10: 2e-7}}
    first = job.run("data", lambda: result)
    path = tmp_path / "stages" / "data.json"
    assert job.run("data", dict) == first
    text = path.read_text()
    path.write_text(text.replace('"rows": 3', '"rows": 2') if damage == "flip" else damage)
    assert job.run("data", lambda: result) == first
    assert path.read_text() == text
    assert len(list(path.parent.glob(".bad-data.json-*"))) == 1


def test_a_job_that_lost_a_record_was_moved_or_meets_other_rows(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ForgeSettings(
        output_dir=tmp_path / "job",
        training=small_run(tiny_model, write_rows(24), tmp_path, max_steps=2, max_length=64),
        pruning=PruneSettings(fraction=0.25, metric="activation", device="cpu", max_length=64),
        cycles=1, heldout_rows=2, samples=1,
    )  # fmt: skip
    whole = forge(settings)
    moved = settings.model_copy(update={"output_dir": tmp_path / "moved"})
    settings.output_dir.rename(moved.output_dir)
    for name in ("cycle-1-pruned", "cycle-1-train"):
        (moved.output_dir / "stages" / f"{name}.json").write_text("{}")
    again = forge(moved, resume=True)
    assert (
        again["cycles"][0]["trained"]["row_losses"] == whole["cycles"][0]["trained"]["row_losses"]
    )
    assert again["cycles"][0]["pruned"]["row_losses"] == whole["cycles"][0]["pruned"]["row_losses"]
    assert again["model"] == str(moved.output_dir / "cycle-1" / "model")
    own = moved.output_dir / "data" / "train.jsonl"
    before = own.read_text()
    own.write_text(before[: before.rindex("{")])
    with pytest.raises(CheckpointError, match=r"train.jsonl is not as this job wrote it"):
        forge(moved, resume=True)
    own.write_text(before)
    rows = Path(moved.training.data[0])
    rows.write_text(rows.read_text().replace("a", "b", 1))
    with pytest.raises(ConfigError, match=r"other settings: rows_digest was"):
        forge(moved, resume=True)
