"""Settings of the schedule: how the learning rate changes over a run."""

from typing import Annotated

from engine.config.choices import DecayShape, Schedule
from engine.config.settings import Settings, setting
from engine.config.spelling import spelled

SCHEDULE_NAMES = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "cosine-with-restarts": "cosine_with_restarts",
    "wsd": "warmup_stable_decay",
    "warmup-stable-decay": "warmup_stable_decay",
}
"""Other spellings of schedules."""


class ScheduleSettings(Settings):
    """The learning rate over the steps of a run, as a share of its peak (`optim.lr_schedule`)."""

    lr_schedule: Annotated[Schedule, spelled(SCHEDULE_NAMES)] = setting(
        "cosine", "Optimisation", "shape after the warm-up"
    )
    warmup_ratio: float | None = setting(
        None, "Optimisation", "share of the steps that warm up (0.03 if neither is set)", ge=0, lt=1
    )
    warmup_steps: int | None = setting(None, "Optimisation", "steps that warm up", ge=0)
    min_lr_ratio: float = setting(
        0.0, "Optimisation", "the schedule ends at this share of the peak", ge=0, le=1
    )
    lr_power: float = setting(
        1.0, "Optimisation", "polynomial: exponent of the share that is left", gt=0, le=100
    )
    lr_num_cycles: int = setting(
        1, "Optimisation", "cosine_with_restarts: how many waves", ge=1, le=100_000
    )
    lr_decay_ratio: float | None = setting(
        None,
        "Optimisation",
        "warmup_stable_decay: share of the steps that decay, at the end (0.1 if neither is set)",
        gt=0,
        le=1,
    )
    lr_decay_steps: int | None = setting(
        None, "Optimisation", "warmup_stable_decay: steps that decay", ge=1
    )
    lr_decay_shape: Annotated[DecayShape, spelled({"sqrt": "1-sqrt"})] = setting(
        "cosine", "Optimisation", "warmup_stable_decay: how they do"
    )

    def warmup(self, total_steps: int) -> int:
        """The number of warm-up steps of a run of `total_steps`."""
        if self.warmup_steps is not None:
            return min(self.warmup_steps, total_steps)
        return round((0.03 if self.warmup_ratio is None else self.warmup_ratio) * total_steps)

    def decay_steps(self, total_steps: int) -> int:
        """The last steps of a run of `total_steps` that decay under warmup_stable_decay."""
        if self.lr_decay_steps is not None:
            return min(self.lr_decay_steps, total_steps)
        share = 0.1 if self.lr_decay_ratio is None else self.lr_decay_ratio
        return max(1, round(share * total_steps))
