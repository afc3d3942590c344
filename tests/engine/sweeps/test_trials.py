"""Sweeps are read strictly, and a trial's values depend on its number and the seed alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.sweeps.parameters import read_parameter
from engine.sweeps.recipe import read_sweep
from engine.sweeps.trials import trials_of

PLAIN: dict[str, Any] = {
    "with": {"model": "m", "data": "d.jsonl", "heldout": 0.1},
    "parameters": {"learning_rate": [1e-4, 3e-4], "lora_rank": [4, 8, 16]},
}
RANGES = {
    "learning_rate": {"min": 1e-5, "max": 1e-3, "scale": "log"},
    "lora_rank": {"min": 4, "max": 64},
    "lora_dropout": {"min": 0.0, "max": 0.2, "step": 0.1},
    "use_dora": [True, False],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        content = {key: value for key, value in (PLAIN | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


def test_a_grid_has_every_combination_once_each_with_a_folder(write: Callable[..., Path]) -> None:
    trials = trials_of(read_sweep(write()))
    assert [(t.values["learning_rate"], t.values["lora_rank"]) for t in trials] == [
        (rate, rank) for rate in (1e-4, 3e-4) for rank in (4, 8, 16)
    ]
    assert trials[4].folder == Path("runs/sweep/trial-005")
    config = TrainConfig(**trials[4].settings)
    assert (config.learning_rate, config.lora_rank, config.heldout) == (3e-4, 8, 0.1)
    assert config.run_id == "sweep-trial-005"


def test_random_trials_depend_on_seed_and_number_and_not_on_how_many_there_are(
    write: Callable[..., Path],
) -> None:
    few = trials_of(read_sweep(write(method="random", trials=5, parameters=RANGES)))
    many = trials_of(read_sweep(write(method="random", trials=40, parameters=RANGES)))
    other = trials_of(read_sweep(write(method="random", trials=5, seed=1, parameters=RANGES)))
    assert [t.values for t in few] == [t.values for t in many[:5]]
    assert [t.values for t in few] != [t.values for t in other]
    rates = [t.values["learning_rate"] for t in many]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 10 <= sum(rate < 1e-4 for rate in rates) <= 30  # the middle of a logarithmic range
    assert {t.values["lora_dropout"] for t in many} == {0.0, 0.1, 0.2}
    ranks = {t.values["lora_rank"] for t in many}
    assert all(isinstance(rank, int) and 4 <= rank <= 64 for rank in ranks)
    assert len({repr(t.values) for t in many}) == 40


def test_a_small_space_is_drawn_once_each_and_no_more(write: Callable[..., Path]) -> None:
    trials = trials_of(read_sweep(write(method="random", trials=50)))
    assert len(trials) == 6
    assert len({repr(t.values) for t in trials}) == 6


def test_preset_file_and_settings_are_under_every_trial(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "train.yaml"
    base.write_text("lr: 0.5\nmodel: other\noutput_dir: runs/one\nbatch_size: 7\n")
    sweep = read_sweep(write(config=str(base)))
    config = TrainConfig(**trials_of(sweep)[0].settings)
    assert (config.batch_size, config.model, config.learning_rate) == (7, "m", 1e-4)
    assert config.output_dir == Path("runs/sweep/trial-001")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameter": {}}, "no key `parameter`; did you mean `parameters`"),
        ({"method": "bayes"}, "a sweep is grid or random"),
        ({"method": "random"}, "needs `trials`"),
        ({"parameters": RANGES}, "a range for learning_rate, lora_rank"),
        ({"parameters": {}}, "mapping of settings and their values"),
        ({"parameters": {"lerning_rate": [1]}}, "did you mean `learning_rate`"),
        ({"parameters": {"lr": [1e-4], "learning_rate": [1e-3]}}, "learning_rate twice"),
        ({"parameters": {"output_dir": ["a", "b"]}}, "its own `output_dir`"),
        ({"parameters": {"lora_rank": 8}}, "a list of values was expected"),
        ({"parameters": {"lora_rank": [8, 8]}}, "a value twice"),
        ({"parameters": {"lora_rank": [8, 0]}}, r"trial-002 \(lora_rank=0\): .*lora_rank"),
        ({"parameters": {"use_dora": [True], "method": ["full"]}}, "use_dora needs method lora"),
        ({"with": {"model": "m", "data": "d"}}, "ranked by heldout_loss"),
        ({"with": {"model": "m"}}, "`data`"),
        ({"with": {"run_id": "x"}}, "its own `run_id`"),
        ({"trials": 0}, "`trials` is 0"),
        ({"goal": "up"}, "minimize or maximize"),
        ({"metric": "best_value"}, "write `goal"),
    ],
)
def test_what_cannot_be_used_is_named(
    write: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        trials_of(read_sweep(write(**changes)))


@pytest.mark.parametrize(
    "given",
    [
        {"min": 1},
        {"min": 2, "max": 1},
        {"min": "a", "max": 1},
        {"min": 0, "max": 1, "scale": "log"},
        {"min": 0, "max": 1, "scale": "odd"},
        {"min": 0, "max": 1, "step": 2},
        {"min": 0, "max": 1, "quant": 2},
        {"min": None, "max": 1},
        {"min": 0, "max": None},
        {"min": 0, "max": True},
        {"min": 0, "max": 10**400},
        {"min": -1.7e308, "max": 1.7e308},
        {"min": 0, "max": 1e300, "step": 1e-300},
        {"min": 0, "max": float("inf")},
        {"value": [1], "values": [1]},
        "1,2",
    ],
)
def test_a_range_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="here"):
        read_parameter("lora_rank", given, "here")


def test_the_metric_says_which_way_is_better(write: Callable[..., Path]) -> None:
    for metric, greatest in (
        ("heldout_loss", False),
        ("eval_perplexity", False),
        ("train_seconds", False),
        ("eval_accuracy", True),
    ):
        assert read_sweep(write(metric=metric)).greatest == greatest
    assert read_sweep(write(metric="eval_loss")).metric == "heldout_loss"
    assert read_sweep(write(goal="maximize")).greatest
