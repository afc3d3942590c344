"""Schedules and optimizers of other programs, with their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.programs.detect import PROGRAMS
from engine.config.programs.translation import Translation
from engine.config.train_config import TrainConfig


def axolotl(**changes: Any) -> Translation:
    """What becomes of a small configuration of axolotl with these keys."""
    given = {"base_model": "m", "adapter": "lora", "learning_rate": 2e-4, "num_epochs": 1}
    return PROGRAMS["axolotl"](given | changes, Path())


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"optimizer": "lion_8bit"}, {"optimizer": "lion8bit"}),
        ({"optimizer": "adafactor"}, {"optimizer": "adafactor"}),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
            {"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 3},
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-5}},
            {"lr_schedule": "cosine", "min_lr_ratio": pytest.approx(0.1)},
        ),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "1-sqrt"},
            },
            {
                "lr_schedule": "warmup_stable_decay",
                "lr_decay_steps": 5,
                "lr_decay_shape": "1-sqrt",
            },
        ),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 2, "lr_end": 0}},
            {"lr_schedule": "polynomial", "lr_power": 2, "min_lr_ratio": 0},
        ),
    ],
)
def test_optimizers_and_schedules_with_their_arguments(
    changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    made = axolotl(**changes)
    assert settings.items() <= made.values().items()
    assert not made.missing.keys() & {"optimizer", "lr_scheduler", "lr_scheduler_kwargs"}
    TrainConfig(**made.values() | {"model": "m", "data": "d"})


def test_arguments_that_a_schedule_does_not_have_are_named() -> None:
    given = {"lr_scheduler": "cosine", "lr_scheduler_kwargs": {"num_cycles": 3}}
    assert "lr_scheduler_kwargs: num_cycles" in axolotl(**given).missing
    given = {"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}
    assert "lr_scheduler_kwargs: lr_end" in axolotl(**given).missing
